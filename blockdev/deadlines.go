package blockdev

import "time"

// Deadlines on what crosses a process boundary, beside those of single QMP
// commands, which are package monitor's. A block job that copies has none: it
// takes as long as its bytes do, and whoever watches it may end it.
const (
	// pivotTimeout is what BeforePivot has. The guest's I/O to the disk stands
	// still meanwhile, and a guest gives a SCSI or SATA disk 30 seconds before it
	// takes it for broken. The hook links, renames and syncs one directory.
	pivotTimeout = 10 * time.Second

	// finalizeTimeout bounds the change of the graph at a job's end: it drains
	// the drive once more and reopens one image.
	finalizeTimeout = 60 * time.Second

	// cancelTimeout bounds the end of a job that was cancelled, which is when its
	// last requests are through. Storage that hangs for longer is not waited for.
	cancelTimeout = 60 * time.Second
)

// watchInterval is how often the progress of a job is asked for.
const watchInterval = 250 * time.Millisecond
