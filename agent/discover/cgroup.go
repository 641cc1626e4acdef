package discover

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/cgroups/v3"
)

// systemdHierarchy is the cgroup v1 hierarchy that holds systemd's units.
const systemdHierarchy = "name=systemd"

// readCgroup finds the place of a process among the host's control groups.
func readCgroup(pid int) (Cgroup, error) {
	data, err := os.ReadFile(procPath(pid, "cgroup"))
	if err != nil {
		return Cgroup{}, gone(pid, err)
	}
	return parseCgroup(hostCgroupMode(), data)
}

func hostCgroupMode() CgroupMode {
	switch cgroups.Mode() {
	case cgroups.Legacy:
		return CgroupV1
	case cgroups.Hybrid:
		return CgroupHybrid
	case cgroups.Unified:
		return CgroupV2
	default:
		return CgroupNone
	}
}

// parseCgroup reads a /proc/PID/cgroup (cgroups(7)). In the hybrid mode
// systemd keeps its units in both hierarchies; where only the old one is used
// the new one says "/".
func parseCgroup(mode CgroupMode, data []byte) (Cgroup, error) {
	controllers, unified, err := cgroups.ParseCgroupFromReaderUnified(bytes.NewReader(data))
	if err != nil {
		return Cgroup{}, fmt.Errorf("cgroup file: %w", err)
	}
	c := Cgroup{Mode: mode, Path: controllers[systemdHierarchy]}
	if mode == CgroupV2 || mode == CgroupHybrid && (c.Path == "" || unified != "/" && unified != "") {
		c.Path = unified
	}
	c.Unit, c.Slice = unitOf(c.Path)
	return c, nil
}

// unitOf finds the unit in a cgroup path as systemd does (cg_path_get_unit):
// the first part that is not a slice. What a unit makes below itself, as
// libvirt and user managers do, is not the system manager's.
func unitOf(path string) (unit, slice string) {
	slice = "-.slice"
	for _, part := range splitPath(path) {
		part = unescapeCgroup(part)
		switch {
		case part == "..": // seen from another cgroup namespace
		case strings.HasSuffix(part, ".slice"):
			slice = part
		case strings.HasSuffix(part, ".service"), strings.HasSuffix(part, ".scope"):
			if isOwnable(part, slice) {
				unit = part
			}
			return unit, slice
		default:
			return "", ""
		}
	}
	return "", ""
}

// isOwnable reports whether a unit can be one VM's: the scopes of login
// sessions and of PID 1, and the services of user managers, never are.
func isOwnable(unit, slice string) bool {
	switch {
	case unit == "init.scope", strings.HasPrefix(unit, "user@"):
		return false
	case strings.HasPrefix(unit, "session-") && strings.HasPrefix(slice, "user-"):
		return false
	}
	return true
}

// unescapeCgroup undoes systemd's escaping of names that the kernel could take
// for its own files: an underscore before them. The \xNN in a unit's name are
// part of the name.
func unescapeCgroup(name string) string {
	return strings.TrimPrefix(name, "_")
}
