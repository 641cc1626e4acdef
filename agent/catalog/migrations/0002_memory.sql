-- What a snapshot has of the guest's memory: JSON, or null.
ALTER TABLE snapshots ADD COLUMN memory TEXT NOT NULL DEFAULT 'null';
