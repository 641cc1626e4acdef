-- What happened. Events outlive what they are about, and their numbers are
-- never used again.
CREATE TABLE events (
  seq       INTEGER PRIMARY KEY AUTOINCREMENT,
  time      INTEGER NOT NULL,
  kind      TEXT NOT NULL,
  severity  INTEGER NOT NULL, -- 0 info, 1 warning, 2 error
  vm        TEXT NOT NULL,
  vm_name   TEXT NOT NULL,
  operation TEXT NOT NULL,
  snapshot  TEXT NOT NULL,
  schedule  TEXT NOT NULL,
  uid       INTEGER,
  disk      TEXT NOT NULL,
  code      TEXT NOT NULL,
  result    TEXT NOT NULL,
  message   TEXT NOT NULL
) STRICT;
CREATE INDEX events_vm ON events (vm, seq) WHERE vm <> '';
CREATE INDEX events_operation ON events (operation, seq) WHERE operation <> '';

-- The last event that each sink has passed on.
CREATE TABLE event_sinks (
  name TEXT PRIMARY KEY,
  seq  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
