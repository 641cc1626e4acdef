package memdump

// Progress is how far a save has come, in QEMU's figures.
type Progress struct {
	Done      uint64 // bytes of memory that are saved and unchanged since
	Total     uint64 // bytes of memory
	Remaining uint64 // bytes of memory still to be saved
	Written   uint64 // bytes written
	Rate      uint64 // bytes written per second, since the last progress
	Pass      int    // pass over memory that is under way, from 1
}
