package discover

import (
	"fmt"
	"regexp"
	"strings"
)

// libvirtDomainDir is the directory that libvirt makes for each domain that it
// starts, of the system or of a user's session; its master key and monitor
// socket are there. Disk images never are.
var libvirtDomainDir = regexp.MustCompile(`/libvirt/qemu/(?:lib/|run/)?domain-\d+-[^/]*/`)

// libvirtMonitor is the id that libvirt gives the chardev of its monitor.
const libvirtMonitor = "charmonitor"

// libvirtScope is how the machined scope of a libvirt domain starts.
const libvirtScope = `machine-qemu\x2d`

// libvirtEvidence says by which argument a QEMU is known to be started by
// libvirt; "" when none shows it. Images under /var/lib/libvirt, or a -name
// with debug-threads, show nothing: people write both by hand.
func libvirtEvidence(args []string) string {
	for i, arg := range args {
		if i > 0 && args[i-1] == "-chardev" && strings.Contains(arg, "id="+libvirtMonitor+",") &&
			strings.Contains(arg, ",fd=") {
			return fmt.Sprintf("its monitor is the inherited chardev %q", libvirtMonitor)
		}
		if dir := libvirtDomainDir.FindString(arg); dir != "" {
			return fmt.Sprintf("its command line names libvirt's domain directory %q", dir)
		}
	}
	return ""
}

// libvirtUnit is the same by the unit that holds the process.
func libvirtUnit(c Cgroup) string {
	if !strings.HasPrefix(c.Unit, libvirtScope) {
		return ""
	}
	return fmt.Sprintf("it runs in the unit %q", c.Unit)
}
