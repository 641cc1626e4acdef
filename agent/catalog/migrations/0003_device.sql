-- What a layer that is a block device is known by, empty for a file.
ALTER TABLE layers ADD COLUMN device TEXT NOT NULL DEFAULT '';
