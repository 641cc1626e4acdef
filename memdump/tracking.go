package memdump

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/monitor"
)

const capBackground = "background-snapshot"

// trackingObstacle returns why writes to the guest's memory cannot be tracked,
// "" if nothing is known against it.
//
// QEMU refuses the capability when the kernel or the memory does not allow it.
// It does not know of those who write past its page tables, other processes
// and devices: they would go unnoticed, and the memory would be torn. Writers
// in the kernel (vhost-net) fault like the guest's CPUs.
func trackingObstacle(ctx context.Context, s *monitor.Session, pid int) (string, error) {
	caps, err := queryCapabilities(ctx, s)
	if err != nil {
		return "", err
	}
	if _, ok := caps[capBackground]; !ok {
		return "this QEMU cannot save in the background (it can from 6.0 on)", nil
	}
	for _, look := range []func(context.Context, *monitor.Session, int) (string, error){
		externalObject, externalNetwork, externalBlock, unsuitableMemory, missingPermission,
	} {
		if reason, err := look(ctx, s, pid); reason != "" || err != nil {
			return reason, err
		}
	}
	return "", nil
}

// object is a child of a QOM directory.
type object struct {
	path, kind string
}

// objects lists the children of the directories that users' objects and
// devices are in.
func objects(ctx context.Context, s *monitor.Session) ([]object, error) {
	var found []object
	for _, dir := range []string{"/objects", "/machine/peripheral", "/machine/peripheral-anon"} {
		var list []struct{ Name, Type string }
		if err := s.Execute(ctx, "qom-list", map[string]string{"path": dir}, &list); err != nil {
			return nil, err
		}
		for _, o := range list {
			if kind, ok := strings.CutPrefix(o.Type, "child<"); ok {
				found = append(found, object{dir + "/" + o.Name, strings.TrimSuffix(kind, ">")})
			}
		}
	}
	return found, nil
}

// externalKinds are the beginnings of the QOM types of devices and backends
// with which others than QEMU and the kernel write to the guest's memory.
var externalKinds = []string{
	"vfio-", "vfio-user-", "x-vfio-user-", "vhost-user", "vhost-vdpa", "cryptodev-vhost-user",
	"ivshmem-", "x-remote-object", "x-pci-proxy-dev",
}

func externalObject(ctx context.Context, s *monitor.Session, _ int) (string, error) {
	list, err := objects(ctx, s)
	if err != nil {
		return "", err
	}
	for _, o := range list {
		for _, kind := range externalKinds {
			if strings.HasPrefix(o.kind, kind) {
				return fmt.Sprintf("%s (%s) writes to the guest's memory past QEMU", o.path, o.kind), nil
			}
		}
	}
	return "", nil
}

// externalNet matches a line of "info network" for a backend that is a process
// or a device of its own. QMP has no list of network backends.
var externalNet = regexp.MustCompile(`(?m)^[ \\]*(\S+): index=\d+,type=(vhost-user|vhost-vdpa),`)

func externalNetwork(ctx context.Context, s *monitor.Session, _ int) (string, error) {
	list, err := ask(ctx, s, "info network")
	if err != nil {
		return "", err
	}
	if m := externalNet.FindStringSubmatch(list); m != nil {
		return fmt.Sprintf("network backend %s (%s) writes to the guest's memory past QEMU", m[1], m[2]), nil
	}
	return "", nil
}

// externalDrivers are block drivers whose device or process reads straight into
// the guest's memory.
var externalDrivers = []string{"nvme", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"}

func externalBlock(ctx context.Context, s *monitor.Session, _ int) (string, error) {
	var nodes []struct {
		Name   string `json:"node-name"`
		Driver string `json:"drv"`
	}
	if err := s.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return "", err
	}
	for _, n := range nodes {
		if slices.Contains(externalDrivers, n.Driver) {
			return fmt.Sprintf("block node %s (%s) writes to the guest's memory past QEMU", n.Name, n.Driver), nil
		}
	}
	return "", nil
}

// unsuitableMemory finds memory backed by a file on a disk, whose pages cannot
// be write-protected (userfaultfd(2): anonymous, shared memory and hugetlbfs).
func unsuitableMemory(ctx context.Context, s *monitor.Session, pid int) (string, error) {
	if pid == 0 {
		return "", nil
	}
	list, err := objects(ctx, s)
	if err != nil {
		return "", err
	}
	for _, o := range list {
		if o.kind != "memory-backend-file" {
			continue
		}
		var path string
		args := map[string]string{"path": o.path, "property": "mem-path"}
		err := s.Execute(ctx, "qom-get", args, &path)
		var gone *monitor.CommandError
		if errors.As(err, &gone) {
			continue // deleted since it was listed
		}
		if err != nil {
			return "", err
		}
		onDisk, err := onDisk(pid, path)
		if err != nil {
			return "", err
		}
		if onDisk {
			return fmt.Sprintf("memory %s is a file on a disk (%s), not in memory or on hugetlbfs", o.path, path), nil
		}
	}
	return "", nil
}

func missingPermission(_ context.Context, s *monitor.Session, pid int) (string, error) {
	if pid == 0 {
		return "", nil
	}
	allowed, err := mayTrack(pid, versionOf(s).AtLeast(8, 0))
	if err != nil || allowed {
		return "", err
	}
	return "the kernel does not let this QEMU process use userfaultfd (CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 " +
		"or, from QEMU 8.0 on, /dev/userfaultfd)", nil
}
