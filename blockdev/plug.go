package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// Plug is a disk that is plugged into a running QEMU.
type Plug struct {
	Node   string  // name of its root node; the protocol node is Node + "-file"
	Device string  // id of the device
	Chain  []Below // its layers, the active one first; Node is not looked at
}

// Open opens the layers in QEMU, the active one for writing. Each layer says what
// it lies on, the lowest that it lies on nothing, so that QEMU follows no header.
// QEMU takes its image locks, and fails when another one has the disk.
func (p Plug) Open(ctx context.Context, m Monitor) error {
	var below any
	for i := len(p.Chain) - 1; i >= 0; i-- {
		l := p.Chain[i]
		file := map[string]any{"driver": "file", "filename": l.Path, "read-only": i > 0, "auto-read-only": false}
		if l.Device {
			file["driver"] = "host_device"
		}
		node := map[string]any{"driver": l.Format, "file": file, "read-only": i > 0}
		if l.Format == "qcow2" {
			node["backing"] = below
		}
		if i == 0 {
			file["node-name"], node["node-name"] = p.Node+"-file", p.Node
			file["discard"], node["discard"] = "unmap", "unmap"
		}
		below = node
	}
	if err := m.Execute(ctx, "blockdev-add", below, nil); err != nil {
		return fmt.Errorf("open %s: %w", p.Chain[0].Path, err)
	}
	return nil
}

// Slot is a place for a disk.
type Slot struct {
	Driver string // of the device: virtio-blk-pci or scsi-hd
	Bus    string // empty: the machine's own, which QEMU chooses
}

// pciDevice is what query-pci tells of one (PciDeviceInfo in qapi/pci.json).
type pciDevice struct {
	QDevID string `json:"qdev_id"`
	Bridge *struct {
		Devices []pciDevice `json:"devices"`
	} `json:"pci_bridge"`
}

// FindSlots returns where a disk can be plugged in, the best first: free PCI
// Express root ports, the machine's PCI bus where that takes devices while it
// runs, and SCSI controllers.
func FindSlots(ctx context.Context, m Monitor) ([]Slot, error) {
	types, err := peripherals(ctx, m)
	if err != nil {
		return nil, err
	}
	var buses []struct {
		Devices []pciDevice `json:"devices"`
	}
	if err := m.Execute(ctx, "query-pci", nil, &buses); err != nil {
		return nil, err
	}
	var slots []Slot
	ports := false
	for _, b := range buses {
		for _, d := range b.Devices {
			if d.Bridge == nil || types[d.QDevID] != "pcie-root-port" && types[d.QDevID] != "ioh3420" {
				continue
			}
			ports = true
			if len(d.Bridge.Devices) == 0 {
				slots = append(slots, Slot{"virtio-blk-pci", d.QDevID})
			}
		}
	}
	if root, err := rootTakesDevices(ctx, m); err != nil {
		return nil, err
	} else if root && !ports {
		slots = append(slots, Slot{"virtio-blk-pci", ""})
	}
	var controllers []Slot
	for id, kind := range types {
		if kind == "virtio-scsi-pci" {
			controllers = append(controllers, Slot{"scsi-hd", id + ".0"})
		}
	}
	slices.SortFunc(controllers, func(x, y Slot) int { return strings.Compare(x.Bus, y.Bus) })
	return append(slots, controllers...), nil
}

// rootTakesDevices reports whether the machine has a PCI bus, and no PCI Express
// one, whose root takes no devices while QEMU runs.
func rootTakesDevices(ctx context.Context, m Monitor) (bool, error) {
	var list []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := m.Execute(ctx, "qom-list", map[string]string{"path": "/machine/unattached"}, &list); err != nil {
		return false, err
	}
	var host []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := m.Execute(ctx, "qom-list", map[string]string{"path": "/machine"}, &host); err != nil {
		return false, err
	}
	for _, o := range append(list, host...) {
		if o.Type == "child<i440FX-pcihost>" || o.Type == "child<i440FX>" {
			return true, nil
		}
	}
	return false, nil
}

// peripherals returns the types of all devices that have an id.
func peripherals(ctx context.Context, m Monitor) (map[string]string, error) {
	var list []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := m.Execute(ctx, "qom-list", map[string]string{"path": "/machine/peripheral"}, &list); err != nil {
		return nil, err
	}
	types := map[string]string{}
	for _, d := range list {
		if kind, ok := strings.CutPrefix(d.Type, "child<"); ok {
			types[d.Name] = strings.TrimSuffix(kind, ">")
		}
	}
	return types, nil
}

// HasDevice reports whether QEMU has a device of an id.
func HasDevice(ctx context.Context, m Monitor, id string) (bool, error) {
	types, err := peripherals(ctx, m)
	return types[id] != "", err
}

// Add plugs the disk, which is open, in.
func (p Plug) Add(ctx context.Context, m Monitor, s Slot) error {
	args := map[string]any{"driver": s.Driver, "id": p.Device, "drive": p.Node}
	if s.Bus != "" {
		args["bus"] = s.Bus
	}
	return m.Execute(ctx, "device_add", args, nil)
}

// Close closes what Open has opened. What is not there is no error.
func (p Plug) Close(ctx context.Context, m Monitor) error { return deleteNode(ctx, m, p.Node) }

// releasePatience is how long QEMU may take to let go of a disk whose device is
// gone: it frees the device when all its threads have seen that.
const releasePatience = 10 * time.Second

// DropReleased is DropUnused for the layers of a disk whose device is gone. It
// waits until QEMU has closed those that nobody else has, top.
func DropReleased(ctx context.Context, m Monitor, names, top []string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, releasePatience, fmt.Errorf("QEMU has %s open still after %s", top[0], releasePatience))
	defer cancel()
	for {
		if err := DropUnused(ctx, m, names); err != nil {
			return err
		}
		g, err := ReadGraph(ctx, m)
		if err != nil {
			return err
		}
		open := false
		for _, n := range g.Nodes {
			open = open || slices.Contains(top, n.Filename)
		}
		if !open {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond): // nothing announces it
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// ErrNotReleased means that a guest has not let go of a device in time.
var ErrNotReleased = errors.New("the guest has not let go of the device")

// Unplug takes a device out, which the guest has to agree to. It fails with
// ErrNotReleased when the guest refuses or has not answered in time; it may then
// still let go of it later.
func Unplug(ctx context.Context, s *monitor.Session, id string, patience time.Duration) error {
	sub := s.Subscribe(16, "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
	defer sub.Close()
	err := s.Execute(ctx, "device_del", map[string]string{"id": id}, nil)
	var refused *monitor.CommandError
	if errors.As(err, &refused) {
		if there, look := HasDevice(ctx, s, id); look == nil && !there {
			return nil
		}
	}
	if err != nil && (refused == nil || !strings.Contains(refused.Desc, "already in the process of unplug")) {
		return fmt.Errorf("take device %s out: %w", id, err)
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		there, err := HasDevice(ctx, s, id)
		if err != nil || !there {
			return err
		}
		select {
		case e, ok := <-sub.C:
			if !ok {
				return monitor.ErrGone
			}
			var data struct {
				Device string `json:"device"`
			}
			if err := e.Decode(&data); err == nil && data.Device == id && e.Name == "DEVICE_UNPLUG_GUEST_ERROR" {
				return fmt.Errorf("%w: it refuses", ErrNotReleased)
			}
		case <-late.C:
			return fmt.Errorf("%w within %s", ErrNotReleased, patience)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
