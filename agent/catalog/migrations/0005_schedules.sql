CREATE TABLE schedules (
  id       TEXT PRIMARY KEY,
  name     TEXT NOT NULL UNIQUE,
  spec     TEXT NOT NULL, -- JSON
  paused   INTEGER NOT NULL,
  uid      INTEGER NOT NULL,
  created  INTEGER NOT NULL,
  changed  INTEGER NOT NULL,
  revision INTEGER NOT NULL
) STRICT;

-- Up to which time a schedule has dealt with a VM.
CREATE TABLE schedule_vms (
  schedule TEXT NOT NULL REFERENCES schedules (id) ON DELETE CASCADE,
  vm       TEXT NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
  handled  INTEGER NOT NULL,
  PRIMARY KEY (schedule, vm)
) STRICT, WITHOUT ROWID;

-- Each time of a schedule has one run of a VM at most. Runs go with their
-- schedule and with their VM; their operations and snapshots stay.
CREATE TABLE schedule_runs (
  schedule  TEXT NOT NULL REFERENCES schedules (id) ON DELETE CASCADE,
  vm        TEXT NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
  time      INTEGER NOT NULL,
  state     TEXT NOT NULL,
  late      INTEGER NOT NULL,
  operation TEXT NOT NULL,
  message   TEXT NOT NULL,
  PRIMARY KEY (schedule, vm, time)
) STRICT, WITHOUT ROWID;
CREATE INDEX schedule_runs_vm ON schedule_runs (vm, time);
