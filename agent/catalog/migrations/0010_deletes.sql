-- Whether a snapshot can be restored: valid, deleting or invalid.
ALTER TABLE snapshots ADD COLUMN state TEXT NOT NULL DEFAULT 'valid';

-- Whether an operation rests.
ALTER TABLE operations ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;
