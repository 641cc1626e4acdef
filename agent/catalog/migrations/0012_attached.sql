-- Whether a disk was plugged in while QEMU ran, so that it ends with that QEMU.
ALTER TABLE disks ADD COLUMN attached INTEGER NOT NULL DEFAULT 0;
