-- What a snapshot has in common with those of the other VMs of its group: JSON, or null.
ALTER TABLE snapshots ADD COLUMN group_cut TEXT NOT NULL DEFAULT 'null';
