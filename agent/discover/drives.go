package discover

import (
	"strconv"
	"strings"
)

// driveOption is a -drive option, or one of its short forms, as -drive keys.
type driveOption struct {
	settings settings
	order    int // place among all block options
}

// shortDrives are the options that stand for a -drive with these keys and
// their argument as the file (system/vl.c). The argument is taken as it is:
// commas have no meaning in it.
var shortDrives = map[string]settings{
	"hda":      {{"index", "0"}, {"media", "disk"}},
	"hdb":      {{"index", "1"}, {"media", "disk"}},
	"hdc":      {{"index", "2"}, {"media", "disk"}},
	"hdd":      {{"index", "3"}, {"media", "disk"}},
	"cdrom":    {{"index", "2"}, {"media", "cdrom"}},
	"fda":      {{"if", "floppy"}, {"index", "0"}},
	"fdb":      {{"if", "floppy"}, {"index", "1"}},
	"pflash":   {{"if", "pflash"}},
	"mtdblock": {{"if", "mtd"}},
	"sd":       {{"if", "sd"}},
}

func (c *commandLine) takeDrive(o option) {
	s := o.settings
	if short, ok := shortDrives[o.name]; ok {
		s = append(settings{{"file", o.arg}}, short...)
	}
	c.drives = append(c.drives, driveOption{s, len(c.drives) + len(c.blockdevs)})
}

// resolveDrives puts together what -drive, -blockdev and -device say.
func (c *commandLine) resolveDrives() {
	graph := newBlockGraph(c.blockdevs)
	out := make([]*Drive, len(c.drives)+len(c.blockdevs))
	names := newDriveNames(c.defaultInterface())
	for _, o := range c.drives {
		d := graph.legacyDrive(o.settings)
		d.ID = names.name(o.settings)
		if d.Interface == "" {
			d.Interface = names.board.iface
		}
		d.Snapshot = d.Snapshot || c.allScratch && !o.settings.has("snapshot")
		out[o.order] = &d
	}
	next := 0
	for _, s := range c.blockdevs {
		for out[next] != nil {
			next++
		}
		d := graph.blockdev(s)
		out[next] = &d
	}
	devices := newDeviceIndex(c.devices)
	for _, d := range out {
		c.attach(d, devices)
		if d.ID != "" || d.Device != "" || !graph.inner[d.Node] {
			c.p.Drives = append(c.p.Drives, *d)
		}
	}
}

// attach finds the device that a drive is used by.
func (c *commandLine) attach(d *Drive, devices deviceIndex) {
	if c.flash[d.ID] || c.flash[d.Node] {
		d.Interface = "pflash"
		return
	}
	for _, ref := range []string{d.ID, d.Node} {
		dev := devices.byDrive[ref]
		if ref == "" || dev == nil {
			continue
		}
		d.Device = dev.value("id")
		d.Interface = deviceInterface(dev.value("driver"))
		d.CDROM = d.CDROM || strings.HasSuffix(dev.value("driver"), "-cd")
		d.IOThread = devices.ioThread(dev)
		return
	}
}

// deviceIndex finds devices by what others know of them.
type deviceIndex struct {
	byDrive map[string]settings // the first that uses a drive or node
	byID    map[string]settings
}

func newDeviceIndex(devices []settings) deviceIndex {
	index := deviceIndex{map[string]settings{}, map[string]settings{}}
	for _, dev := range devices {
		if ref := dev.value("drive"); ref != "" && index.byDrive[ref] == nil {
			index.byDrive[ref] = dev
		}
		index.byID[dev.value("id")] = dev
	}
	return index
}

// ioThread returns the iothread of a device, or of the controller that it is
// plugged into: bus=ID.0.
func (index deviceIndex) ioThread(dev settings) string {
	if own := dev.value("iothread"); own != "" {
		return own
	}
	bus := dev.value("bus")
	dot := strings.LastIndexByte(bus, '.')
	if dot <= 0 {
		return ""
	}
	return index.byID[bus[:dot]].value("iothread")
}

// deviceInterface names the bus of a block device model.
func deviceInterface(driver string) string {
	prefixes := []struct{ prefix, iface string }{
		{"virtio-blk", "virtio"}, {"scsi-", "scsi"}, {"ide-", "ide"},
		{"nvme", "nvme"}, {"usb-", "usb"}, {"floppy", "floppy"},
		{"sd-card", "sd"}, {"cfi.pflash", "pflash"},
	}
	for _, p := range prefixes {
		if strings.HasPrefix(driver, p.prefix) {
			return p.iface
		}
	}
	return driver
}

// defaultInterface is what a -drive without if= gets; "" where the machine
// type's choice is not known.
func (c *commandLine) defaultInterface() boardDrives {
	machine := c.p.Machine
	x86 := strings.Contains(c.p.Args[0], "x86_64") || strings.Contains(c.p.Args[0], "i386") ||
		strings.HasSuffix(c.p.Args[0], "kvm")
	switch {
	case machine == "none":
		return boardDrives{iface: "none"}
	case strings.HasPrefix(machine, "q35"), strings.HasPrefix(machine, "pc-q35"):
		return boardDrives{iface: "ide", perBus: 1}
	case strings.HasPrefix(machine, "pc"), machine == "isapc", machine == "" && x86:
		return boardDrives{iface: "ide"}
	case strings.HasPrefix(machine, "virt"), strings.HasPrefix(machine, "s390-ccw-virtio"):
		return boardDrives{iface: "virtio"}
	case strings.HasPrefix(machine, "pseries"):
		return boardDrives{iface: "scsi"}
	}
	return boardDrives{}
}

// boardDrives is how a machine type places its default drives.
type boardDrives struct {
	iface  string
	perBus int // units on a bus of that interface, when it differs from the usual
}

// driveNames gives drives without an id the one that QEMU makes up, from their
// interface and place (blockdev.c, drive_new).
type driveNames struct {
	board boardDrives
	taken map[drivePlace]bool
	free  map[drivePlace]drivePlace // the first place that may be free, searching from the key on
}

type drivePlace struct {
	iface     string
	bus, unit int
}

func newDriveNames(board boardDrives) *driveNames {
	return &driveNames{board, map[drivePlace]bool{}, map[drivePlace]drivePlace{}}
}

func (n *driveNames) perBus(iface string) int {
	if n.board.perBus != 0 && iface == n.board.iface {
		return n.board.perBus
	}
	return map[string]int{"ide": 2, "scsi": 7}[iface]
}

// name places a drive and returns its id; "" when the interface is not known.
func (n *driveNames) name(s settings) string {
	iface, ok := s.get("if")
	if !ok {
		iface = n.board.iface
	}
	place := n.place(iface, s)
	if id, ok := s.get("id"); ok || iface == "" {
		return id
	}
	media := ""
	if iface == "ide" || iface == "scsi" {
		media = "-hd"
		if s.value("media") == "cdrom" {
			media = "-cd"
		}
	}
	bus := ""
	if n.perBus(iface) != 0 {
		bus = strconv.Itoa(place.bus)
	}
	return iface + bus + media + strconv.Itoa(place.unit)
}

// place takes the bus and unit that a drive asks for, or the first free one.
func (n *driveNames) place(iface string, s settings) drivePlace {
	perBus := n.perBus(iface)
	place := drivePlace{iface: iface, bus: number(s, "bus", 0), unit: number(s, "unit", -1)}
	if index := number(s, "index", -1); index >= 0 {
		place.bus, place.unit = 0, index
		if perBus != 0 {
			place.bus, place.unit = index/perBus, index%perBus
		}
	}
	if place.unit < 0 {
		place.unit = 0
		place = n.firstFree(place, perBus)
	}
	n.taken[place] = true
	return place
}

// firstFree returns the first free place from one on. Places are never given
// back, so the next search can begin where this one ended.
func (n *driveNames) firstFree(from drivePlace, perBus int) drivePlace {
	place, searched := n.free[from]
	if !searched {
		place = from
	}
	for n.taken[place] {
		if place.unit++; perBus != 0 && place.unit >= perBus {
			place.unit, place.bus = 0, place.bus+1
		}
	}
	n.free[from] = place
	return place
}

// number reads a small count; fallback when it is absent or no such number.
func number(s settings, key string, fallback int) int {
	n, err := strconv.ParseUint(s.value(key), 10, 16)
	if err != nil {
		return fallback
	}
	return int(n)
}
