-- Times are nanoseconds since 1970 UTC, 0 for none. Sizes are bytes. Columns
-- that hold JSON say so.

CREATE TABLE vms (
  id         TEXT PRIMARY KEY,
  name       TEXT NOT NULL,
  uuid       TEXT NOT NULL,
  identity   TEXT NOT NULL UNIQUE,
  unit       TEXT NOT NULL,
  first_seen INTEGER NOT NULL,
  last_seen  INTEGER NOT NULL,
  stopped    TEXT NOT NULL,
  command    TEXT NOT NULL -- JSON
) STRICT;

CREATE TABLE disks (
  id            TEXT PRIMARY KEY,
  vm            TEXT NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
  device        TEXT NOT NULL,
  launch_path   TEXT NOT NULL,
  launch_format TEXT NOT NULL,
  active_layer  TEXT REFERENCES layers (id) DEFERRABLE INITIALLY DEFERRED,
  settle_needed INTEGER NOT NULL,
  removed       INTEGER NOT NULL
) STRICT;
-- A device id may be used again once its disk was removed.
CREATE UNIQUE INDEX disks_device ON disks (vm, device) WHERE removed = 0;
CREATE INDEX disks_active_layer ON disks (active_layer);

CREATE TABLE layers (
  id           TEXT PRIMARY KEY,
  disk         TEXT NOT NULL REFERENCES disks (id) ON DELETE CASCADE,
  parent       TEXT REFERENCES layers (id) DEFERRABLE INITIALLY DEFERRED,
  path         TEXT NOT NULL,
  format       TEXT NOT NULL,
  virtual_size INTEGER NOT NULL,
  dev          INTEGER NOT NULL, -- the 64 bits of an unsigned number
  ino          INTEGER NOT NULL, -- the 64 bits of an unsigned number
  is_foreign   INTEGER NOT NULL,
  immutable    INTEGER NOT NULL,
  covered      INTEGER NOT NULL,
  operation    TEXT NOT NULL,
  created      INTEGER NOT NULL
) STRICT;
CREATE INDEX layers_disk ON layers (disk);
CREATE INDEX layers_parent ON layers (parent);
CREATE INDEX layers_inode ON layers (ino, dev);

CREATE TABLE snapshots (
  seq               INTEGER PRIMARY KEY AUTOINCREMENT,
  id                TEXT NOT NULL UNIQUE,
  vm                TEXT NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
  vm_name           TEXT NOT NULL,
  name              TEXT NOT NULL,
  description       TEXT NOT NULL,
  labels            TEXT NOT NULL, -- JSON
  created           INTEGER NOT NULL,
  consistency       TEXT NOT NULL,
  quiesce_requested TEXT NOT NULL,
  quiesce_reason    TEXT NOT NULL,
  quiesce_frozen    INTEGER NOT NULL,
  quiesce_total     INTEGER NOT NULL,
  freeze_window     INTEGER NOT NULL, -- nanoseconds
  warnings          TEXT NOT NULL, -- JSON
  operation         TEXT NOT NULL,
  config            TEXT NOT NULL, -- JSON, or empty
  partial           INTEGER NOT NULL,
  UNIQUE (vm, name)
) STRICT;
CREATE INDEX snapshots_created ON snapshots (vm, created);

CREATE TABLE snapshot_disks (
  snapshot TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
  position INTEGER NOT NULL,
  disk     TEXT REFERENCES disks (id) DEFERRABLE INITIALLY DEFERRED,
  device   TEXT NOT NULL,
  layer    TEXT REFERENCES layers (id) DEFERRABLE INITIALLY DEFERRED,
  size     INTEGER NOT NULL,
  excluded INTEGER NOT NULL,
  PRIMARY KEY (snapshot, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX snapshot_disks_disk ON snapshot_disks (disk);
CREATE INDEX snapshot_disks_layer ON snapshot_disks (layer);

-- Operations outlive their VM: they are its history.
CREATE TABLE operations (
  seq        INTEGER PRIMARY KEY AUTOINCREMENT,
  id         TEXT NOT NULL UNIQUE,
  kind       TEXT NOT NULL,
  vm         TEXT NOT NULL,
  vm_name    TEXT NOT NULL,
  state      TEXT NOT NULL,
  request    TEXT NOT NULL, -- JSON, or empty
  request_id TEXT NOT NULL,
  uid        INTEGER NOT NULL,
  steps      TEXT NOT NULL, -- JSON
  progress   TEXT NOT NULL, -- JSON
  warnings   TEXT NOT NULL, -- JSON
  failure    TEXT NOT NULL, -- JSON
  partial    INTEGER NOT NULL,
  snapshot   TEXT NOT NULL,
  created    INTEGER NOT NULL,
  started    INTEGER NOT NULL,
  ended      INTEGER NOT NULL,
  revision   INTEGER NOT NULL
) STRICT;
CREATE INDEX operations_vm ON operations (vm);
CREATE INDEX operations_unfinished ON operations (seq) WHERE ended = 0;

-- A request id stands for its operation for a while; the operation stays.
CREATE TABLE requests (
  uid        INTEGER NOT NULL,
  request_id TEXT NOT NULL,
  operation  TEXT NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
  created    INTEGER NOT NULL,
  PRIMARY KEY (uid, request_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_created ON requests (created);
CREATE INDEX requests_operation ON requests (operation);

CREATE TABLE journal (
  seq       INTEGER PRIMARY KEY AUTOINCREMENT,
  operation TEXT NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
  kind      TEXT NOT NULL,
  data      TEXT NOT NULL, -- JSON
  time      INTEGER NOT NULL
) STRICT;
CREATE INDEX journal_operation ON journal (operation);
