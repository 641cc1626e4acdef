-- When a snapshot is to be deleted by itself, in nanoseconds since 1970; 0: never.
ALTER TABLE snapshots ADD COLUMN expires INTEGER NOT NULL DEFAULT 0;
CREATE INDEX snapshots_expires ON snapshots (expires) WHERE expires > 0;
