package memdump

// Strategy is a way to save the memory of a guest.
type Strategy string

// The strategies.
const (
	// Background has QEMU track writes: the CPUs stand still until it does,
	// whatever the memory's size.
	Background Strategy = "background"
	// Precopy is a live migration into a file: the CPUs stand still for its
	// last pass.
	Precopy Strategy = "precopy"
	// Stopped has the CPUs stand still until all is saved.
	Stopped Strategy = "stopped"
)
