package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
)

// CloneVMRequest asks for a new VM that begins with what a snapshot holds.
type CloneVMRequest struct {
	Snapshot string            // VM/NAME or id
	Name     string            // of the new VM
	Disks    []string          `json:",omitempty"` // all of the snapshot when empty
	Full     bool              // copies that depend on nothing, instead of disks that lie on the snapshot
	Dir      string            `json:",omitempty"` // where its files are made; beside the disks of the origin when empty
	Start    bool              `json:",omitempty"` // by the launcher
	Launcher launch.Kind       `json:",omitempty"`
	Replace  map[string]string `json:",omitempty"` // resources of the host that the origin's command names
	Caller   Caller            // who may write there

	RequestID string `json:"-"`
}

// Definition is what defines a clone, beside its disks: a controller or an
// operator starts it by that. It is the content of the file NEW.vm.json.
type Definition struct {
	launch.Spec
	Origin     string   `json:"origin"` // the snapshot
	MACs       []string `json:"mac_addresses,omitempty"`
	Generation string   `json:"generation_id"`
	Disks      []string `json:"disks"` // the files
	Linked     bool     `json:"linked"`
}

// maxFirmware bounds a file of firmware variables; those of OVMF have half a MiB.
const maxFirmware = 64 << 20

// CloneVM starts making a VM from a snapshot and returns the operation, which
// holds the origin.
func (a *Agent) CloneVM(ctx context.Context, req CloneVMRequest) (op.Record, error) {
	s, v, err := a.snapshotOf(ctx, req.Snapshot)
	if err != nil {
		return op.Record{}, err
	}
	if err := a.checkCloneName(req.Name); err != nil {
		return op.Record{}, err
	}
	if req.Dir != "" {
		if err := checkPlace(req.Dir); err != nil {
			return op.Record{}, err
		}
	}
	spec := op.Spec{Kind: op.KindClone, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.Caller.UID}
	return a.begin(ctx, spec, func(ctx context.Context, o *op.Op) error { return a.cloneVM(ctx, o, v, s, req) })
}

// checkCloneName refuses names that another VM has, and those that files cannot
// begin with.
func (a *Agent) checkCloneName(name string) error {
	if err := checkVMName(name); err != nil {
		return err
	}
	_, err := a.find(name)
	if fault.Of(err) == fault.NotFound {
		return nil
	}
	return fault.New(fault.Exists, "there is a VM %s already", name).WithHint("choose another name")
}

func checkVMName(name string) error {
	for _, c := range name {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-", c) {
			return fault.New(fault.Usage, "the VM's name %q contains %q", name, c).WithHint("use letters, digits and the marks - _ .")
		}
	}
	if name == "" || len(name) > maxName || name[0] == '.' || name[0] == '-' {
		return fault.New(fault.Usage, "the VM's name %q is empty, longer than %d, or begins with a mark", name, maxName)
	}
	return nil
}

// vmCloning is a VM being made from a snapshot.
type vmCloning struct {
	*Agent
	o        *op.Op
	vm       *vm
	snapshot catalog.Snapshot
	req      CloneVMRequest
	origin   launch.Machine
	disks    []*cloning
	firmware []*firmwareCopy
	out      *outFile // the definition
	def      Definition
	launched *launch.Launched
}

// firmwareCopy is a file of firmware variables being copied.
type firmwareCopy struct {
	from *os.File
	out  *outFile
}

// cloneVM is the recipe.
func (a *Agent) cloneVM(ctx context.Context, o *op.Op, v *vm, s catalog.Snapshot, req CloneVMRequest) error {
	o.Plan(4)
	o.SetSnapshot(s.ID)
	c := &vmCloning{Agent: a, o: o, vm: v, snapshot: s, req: req}
	if err := o.Step(ctx, "preflight", c.prepare); err != nil {
		return err
	}
	files, record, err := makeEach(ctx, o, c.disks)
	if err != nil {
		return err
	}
	for _, f := range c.firmware {
		if err := o.Step(ctx, "firmware", func(ctx context.Context) error { return f.copy(ctx, o) }); err != nil {
			return err
		}
		files = append(files, f.out)
	}
	if err := o.Step(ctx, "define", c.define); err != nil {
		return err
	}
	files = append(files, c.out)
	if !req.Start {
		return o.Step(ctx, "publish", func(ctx context.Context) error { return publishAll(ctx, o, files, record) })
	}
	if err := o.Step(ctx, "publish", func(ctx context.Context) error { return nameAll(ctx, o, files, record) }); err != nil {
		return err
	}
	return c.start(ctx)
}

// prepare looks at everything that the clone depends on, and changes nothing.
func (c *vmCloning) prepare(ctx context.Context) error {
	if err := c.checkCloneName(c.req.Name); err != nil {
		return err
	}
	var captured configuration
	if err := json.Unmarshal(c.snapshot.Config, &captured); err != nil || len(captured.Command) == 0 {
		return fault.New(fault.Unsupported, "snapshot %s/%s does not hold a launch command", c.vm.name(), c.snapshot.Name).
			WithHint("vmsnap snapshot clone --disk D ./FILE makes its disks, one by one")
	}
	c.origin = captured.machine()
	c.origin.Unit = "" // which is the origin's own
	if c.origin.Foreign {
		return fault.New(fault.Unsupported, "VM %s: QEMU has a file system tree of its own, which a clone would not have", c.vm.name()).
			WithHint("vmsnap snapshot clone --disk D ./FILE makes its disks, one by one")
	}
	if c.req.Start && c.req.Caller.UID != 0 && int(c.req.Caller.UID) != c.origin.UID {
		return fault.New(fault.Denied, "uid %d may not start a QEMU as uid %d, which that of VM %s has", c.req.Caller.UID, c.origin.UID, c.vm.name()).
			WithHint("leave out --start, and start it by its definition")
	}
	points, err := c.pointsOf(ctx, c.vm, c.snapshot, c.req.Disks)
	if err != nil {
		return err
	}
	if len(points) == 0 {
		return fault.New(fault.Unsupported, "snapshot %s/%s holds no disk", c.vm.name(), c.snapshot.Name)
	}
	named, err := c.placeDisks(ctx, points)
	if err != nil {
		return err
	}
	if err := c.enough(); err != nil {
		return err
	}
	return c.specify(ctx, named)
}

// placeDisks prepares the disks, and returns their files by what the captured
// launch command calls them.
func (c *vmCloning) placeDisks(ctx context.Context, points []catalog.SnapshotDisk) (map[string]string, error) {
	disks, err := c.catalog.Disks(ctx, c.vm.id)
	if err != nil {
		return nil, err
	}
	p, err := discover.ParseCommandLine(c.origin.Command)
	if err != nil {
		return nil, fault.New(fault.Failed, "VM %s: the launch command of the snapshot: %w", c.vm.name(), err)
	}
	p.Cwd = c.origin.Directory
	named := map[string]string{}
	for _, point := range points {
		i := slices.IndexFunc(disks, func(d catalog.Disk) bool { return d.ID == point.DiskID })
		if i < 0 {
			return nil, fault.New(fault.Failed, "VM %s: disk %s is not known any more", c.vm.name(), point.Device)
		}
		key := c.calledInLaunch(p, point, disks[i])
		if key == "" {
			return nil, fault.New(fault.Unsupported, "VM %s: disk %s is not in the launch command of the snapshot", c.vm.name(), point.Device).
				WithHint("choose the other disks with --disk")
		}
		dir := c.req.Dir
		if dir == "" {
			dir = filepath.Dir(disks[i].LaunchPath)
		}
		d := &cloning{copying: copying{Agent: c.Agent, o: c.o, vm: c.vm, format: "qcow2"}, linked: !c.req.Full, vmName: c.req.Name}
		if err := d.prepare(ctx, point, filepath.Join(dir, c.req.Name+"-"+fileWord(point.Device)+".qcow2"), c.req.Caller); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(c.disks, func(o *cloning) bool { return o.out.path() == d.out.path() }) {
			return nil, fault.New(fault.Unsupported, "VM %s: the files of two disks would both be called %s", c.vm.name(), d.out.path())
		}
		c.disks = append(c.disks, d)
		named[key] = d.out.path()
	}
	return named, nil
}

// calledInLaunch returns what the captured launch command calls a disk; "" when it
// is not there.
func (c *vmCloning) calledInLaunch(p discover.Process, point catalog.SnapshotDisk, d catalog.Disk) string {
	label := point.Device
	for _, s := range c.snapshot.Disks {
		if s.DiskID == point.DiskID {
			label = s.Device // it may have another name by now
		}
	}
	for _, l := range p.Drives {
		if label != "" && (label == l.Device || label == l.ID || label == l.Node) {
			return label
		}
	}
	for _, l := range p.Drives {
		if l.File != "" && absolute(p, l.File) == d.LaunchPath {
			return l.File
		}
	}
	return ""
}

// fileWord makes a name one that stands well in a file's.
func fileWord(name string) string {
	word := strings.Map(func(c rune) rune {
		if checkVMName("x"+string(c)) != nil {
			return '-'
		}
		return c
	}, name)
	return strings.Trim(word, "-")
}

// enough fails when the disks cannot all fit: each alone has been found to.
func (c *vmCloning) enough() error {
	need, devices := map[string]uint64{}, map[string][]string{}
	for _, d := range c.disks {
		dir := d.out.Dir
		need[dir] += d.need
		devices[dir] = append(devices[dir], d.point.Device)
	}
	for _, d := range c.disks {
		if all := devices[d.out.Dir]; len(all) > 1 {
			if err := d.fits(need[d.out.Dir], "disks "+strings.Join(all, ", ")); err != nil {
				return err
			}
		}
	}
	return nil
}

// specify makes the launch specification of the clone.
func (c *vmCloning) specify(ctx context.Context, disks map[string]string) error {
	taken, err := c.addresses(ctx)
	if err != nil {
		return err
	}
	uuid, generation := newUUID(), newUUID()
	cloned, err := c.origin.Clone(launch.Clone{
		Origin: c.vm.name(), Name: c.req.Name, UUID: uuid, Generation: generation, Disks: disks, Replace: c.req.Replace,
		MAC: taken.fresh, Firmware: c.placeFirmware,
		IsDirectory: func(path string) bool {
			fi, err := os.Stat(inDirectory(c.origin.Directory, path))
			return err == nil && fi.IsDir()
		},
	})
	if err != nil {
		return err
	}
	for _, path := range cloned.Files {
		if _, err := os.Lstat(inDirectory(c.origin.Directory, path)); !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return err
			}
			return fault.New(fault.Exists, "%s is there already, which QEMU of VM %s would make", path, c.req.Name).WithHint("choose another name, or remove it")
		}
	}
	for _, name := range cloned.Omitted {
		c.o.Warn(op.Warning{Code: warnExcluded, Disk: name, Message: "the clone does without the drive " + name})
	}
	m := c.origin
	m.Command = cloned.Command
	kind := launch.External
	if c.req.Start {
		if kind, err = c.chooseLauncher(ctx, m); err != nil {
			return err
		}
	}
	c.def = Definition{Origin: c.vm.name() + "/" + c.snapshot.Name, MACs: cloned.MACs, Generation: generation, Linked: !c.req.Full}
	c.def.Spec, err = launch.New(launch.Order{Machine: m, Launcher: kind, Operation: c.o.ID(), VM: c.req.Name, UUID: uuid, LogDir: c.cfg.StateDir, Boots: true})
	if err != nil {
		return err
	}
	for _, d := range c.disks {
		c.def.Disks = append(c.def.Disks, d.out.path())
	}
	if c.req.Start {
		if err := c.def.Probe(ctx); err != nil {
			return err
		}
	}
	if c.out, err = planOut(filepath.Join(c.disks[0].out.Dir, c.req.Name+".vm.json"), c.o.ID(), c.req.Caller); err != nil {
		return err
	}
	c.o.Cleanup(func() { _ = c.out.close() })
	return nil
}

func (c *vmCloning) chooseLauncher(ctx context.Context, m launch.Machine) (launch.Kind, error) {
	want := c.req.Launcher
	if want == launch.Automatic {
		want = c.cfg.Launcher
	}
	if want == launch.Unit && c.req.Launcher == launch.Automatic {
		want = launch.Automatic // the setting is for VMs that have units
	}
	return launch.Choose(ctx, m, want, 0)
}

func inDirectory(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// placeFirmware plans the copy of a file of firmware variables.
func (c *vmCloning) placeFirmware(path string) (string, error) {
	from, err := filepath.EvalSymlinks(inDirectory(c.origin.Directory, path))
	if err != nil {
		return "", fault.New(fault.Failed, "VM %s: firmware variables: %w", c.vm.name(), err)
	}
	f := &firmwareCopy{}
	who := Caller{UID: uint32(c.origin.UID), GID: uint32(c.origin.GID)}
	for _, g := range c.origin.Groups {
		who.Groups = append(who.Groups, uint32(g))
	}
	// As the QEMU that has it: what its command line names is no more than a claim.
	if f.from, err = who.openImage(from); err != nil {
		return "", err
	}
	c.o.Cleanup(func() { _ = f.from.Close() })
	dir := c.req.Dir
	if dir == "" {
		dir = filepath.Dir(from)
	}
	if f.out, err = planOut(filepath.Join(dir, c.req.Name+"-"+filepath.Base(from)), c.o.ID(), c.req.Caller); err != nil {
		return "", err
	}
	c.o.Cleanup(func() { _ = f.out.close() })
	if c.req.Caller.UID == 0 {
		if err := f.out.ownedLike(from); err != nil {
			return "", err
		}
	}
	c.firmware = append(c.firmware, f)
	return f.out.path(), nil
}

// copy copies the variables as they are now.
func (f *firmwareCopy) copy(ctx context.Context, o *op.Op) error {
	if err := f.out.begin(ctx, o); err != nil {
		return err
	}
	n, err := io.Copy(f.out.file, io.LimitReader(f.from, maxFirmware+1))
	if err == nil && n > maxFirmware {
		err = fault.New(fault.Unsupported, "it is larger than %d bytes", maxFirmware)
	}
	if err == nil {
		err = f.out.file.Sync()
	}
	if err != nil {
		return fault.New(kindOf(err), "copy firmware variables to %s: %w", f.out.path(), err)
	}
	return nil
}

// define writes the definition, and shows it.
func (c *vmCloning) define(ctx context.Context) error {
	text, err := json.MarshalIndent(c.def, "", "  ")
	if err != nil {
		return err
	}
	if err := c.out.begin(ctx, c.o); err != nil {
		return err
	}
	if _, err := c.out.file.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", c.out.path(), err)
	}
	if err := c.out.file.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", c.out.path(), err)
	}
	c.o.Output(string(text))
	return nil
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
