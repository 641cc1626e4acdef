-- Whether a snapshot is kept from being deleted.
ALTER TABLE snapshots ADD COLUMN template INTEGER NOT NULL DEFAULT 0;

-- Images that lie on a layer and are no layers of a disk of its VM.
CREATE TABLE clones (
  path      TEXT PRIMARY KEY,
  layer     TEXT NOT NULL REFERENCES layers (id) ON DELETE CASCADE,
  vm_name   TEXT NOT NULL, -- of the VM that it was made for; "" for a disk alone
  dev       INTEGER NOT NULL,
  ino       INTEGER NOT NULL,
  operation TEXT NOT NULL,
  created   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX clones_layer ON clones (layer);
