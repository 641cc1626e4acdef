package main

import (
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// host is what the figures were taken on.
type host struct {
	name, cpu, kernel string
	memoryMiB         uint64
	load              string // before the run, over one, five and fifteen minutes
	qemus             []string
}

// saw adds a version of QEMU that was measured on.
func (h *host) saw(version string) {
	if q := "QEMU " + version; !slices.Contains(h.qemus, q) {
		h.qemus = append(h.qemus, q)
	}
}

var cpuModel = regexp.MustCompile(`(?m)^model name\s*:\s*(.+)$`)

func describeHost() (host, error) {
	name, err := os.Hostname()
	if err != nil {
		return host{}, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return host{}, fmt.Errorf("uname: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return host{}, fmt.Errorf("sysinfo: %w", err)
	}
	cpus, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return host{}, err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return host{}, err
	}
	h := host{
		name: name, cpu: "unknown", kernel: unix.ByteSliceToString(uts.Release[:]),
		memoryMiB: uint64(info.Totalram) * uint64(info.Unit) >> 20,
		load:      strings.Join(strings.Fields(string(load))[:3], " "),
	}
	if m := cpuModel.FindSubmatch(cpus); m != nil {
		h.cpu = string(m[1])
	}
	h.cpu = fmt.Sprintf("%s, %d cores", h.cpu, runtime.NumCPU())
	return h, nil
}
