-- The trial state that a VM runs. It ends when it is committed or undone.
CREATE TABLE previews (
  vm   TEXT PRIMARY KEY REFERENCES vms (id) ON DELETE CASCADE,
  data TEXT NOT NULL -- JSON
) STRICT, WITHOUT ROWID;
