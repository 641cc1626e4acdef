package discover

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Usage is what the processes of a control group have done and waited for since
// it was made (the kernel's Documentation/admin-guide/cgroup-v2.rst).
type Usage struct {
	IO       *IOUsage // nil when the io controller is not on for the group
	Pressure []Pressure
}

// IOUsage is the I/O of a control group on all devices.
type IOUsage struct {
	ReadBytes, WriteBytes, Reads, Writes uint64
}

// Pressure is for how long processes stood still for want of something.
type Pressure struct {
	Resource string        // cpu, io or memory
	Some     time.Duration // at least one of them
	Full     time.Duration // all of them at once
}

// cgroupRoot is where the unified hierarchy is mounted.
const cgroupRoot = "/sys/fs/cgroup"

// maxCgroupFile bounds what is read of one file. io.stat has a line for each
// device.
const maxCgroupFile = 1 << 20

// ReadUsage reads what a control group of the unified hierarchy has used. What
// its kernel or its parents do not count is left out.
func ReadUsage(path string) *Usage { return readUsage(filepath.Join(cgroupRoot, path)) }

func readUsage(dir string) *Usage {
	u := new(Usage)
	if f, err := os.Open(filepath.Join(dir, "io.stat")); err == nil {
		total := parseIOStat(f)
		u.IO = &total
		_ = f.Close() // it was only read
	}
	for _, resource := range []string{"cpu", "io", "memory"} {
		f, err := os.Open(filepath.Join(dir, resource+".pressure"))
		if err != nil {
			continue
		}
		if p, ok := parsePressure(f); ok {
			p.Resource = resource
			u.Pressure = append(u.Pressure, p)
		}
		_ = f.Close() // it was only read
	}
	return u
}

// parseIOStat adds up the devices of an io.stat:
//
//	8:0 rbytes=90112 wbytes=0 rios=3 wios=0 dbytes=0 dios=0
func parseIOStat(r io.Reader) (total IOUsage) {
	lines := bufio.NewScanner(io.LimitReader(r, maxCgroupFile))
	for lines.Scan() {
		for _, field := range strings.Fields(lines.Text()) {
			key, value, _ := strings.Cut(field, "=")
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				continue
			}
			switch key {
			case "rbytes":
				total.ReadBytes += n
			case "wbytes":
				total.WriteBytes += n
			case "rios":
				total.Reads += n
			case "wios":
				total.Writes += n
			}
		}
	}
	return total
}

// parsePressure reads the totals of a pressure file, in microseconds:
//
//	some avg10=0.00 avg60=0.00 avg300=0.00 total=1234
//	full avg10=0.00 avg60=0.00 avg300=0.00 total=567
func parsePressure(r io.Reader) (p Pressure, ok bool) {
	lines := bufio.NewScanner(io.LimitReader(r, maxCgroupFile))
	for lines.Scan() {
		line := lines.Text()
		at := strings.LastIndex(line, " total=")
		if at < 0 {
			continue
		}
		n, err := strconv.ParseInt(line[at+len(" total="):], 10, 64)
		if err != nil || n < 0 || n > int64(maxPressure/time.Microsecond) {
			continue
		}
		switch {
		case strings.HasPrefix(line, "some "):
			p.Some, ok = time.Duration(n)*time.Microsecond, true
		case strings.HasPrefix(line, "full "):
			p.Full, ok = time.Duration(n)*time.Microsecond, true
		}
	}
	return p, ok
}

// maxPressure is what a Duration can hold.
const maxPressure = time.Duration(1<<63 - 1)
