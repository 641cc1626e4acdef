-- Whether the agent took a snapshot by itself, of the state before a restore.
ALTER TABLE snapshots ADD COLUMN automatic INTEGER NOT NULL DEFAULT 0;
