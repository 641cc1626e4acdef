package launch

import (
	"strings"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// shortForms are -drive's keys of the options that stand for one.
var shortForms = map[string]string{
	"hda": "index=0,media=disk", "hdb": "index=1,media=disk", "hdc": "index=2,media=disk", "hdd": "index=3,media=disk",
	"cdrom": "index=2,media=cdrom", "fda": "if=floppy,index=0", "fdb": "if=floppy,index=1", "pflash": "if=pflash", "mtdblock": "if=mtd", "sd": "if=sd",
}

// fate is what becomes of a drive.
type fate struct {
	drive    discover.Drive
	file     string // of the clone; "" for the one that the origin has
	firmware bool
	omitted  bool
}

// planDrives decides what becomes of each drive. Several options may make one, and
// are found by its id or by the names of its nodes.
func (r *cloning) planDrives(drives []discover.Drive, options []discover.Option) {
	for _, d := range drives {
		f := &fate{drive: d}
		for _, key := range []string{d.Device, d.ID, d.Node, d.File} {
			if file, ok := r.Disks[key]; ok && key != "" && f.file == "" {
				f.file = file
				r.out.Used = append(r.out.Used, key)
			}
		}
		switch {
		case f.file != "" && d.ExplicitBacking:
			r.fail("drive %s says by itself what it lies on", driveName(d))
		case f.file != "":
		case d.ReadOnly || d.CDROM || d.Snapshot || d.Protocol == "" && d.File == "":
		case d.Interface == "pflash":
			f.firmware = true
		default:
			f.omitted = true
			r.out.Omitted = append(r.out.Omitted, driveName(d))
			r.gone[d.ID], r.gone[d.Node] = true, true
		}
		r.drives = append(r.drives, f)
	}
	delete(r.gone, "")
	r.followNodes(options)
}

// fail notes what makes the clone impossible.
func (r *cloning) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fault.New(fault.Unsupported, "the launch command of VM "+r.Origin+" cannot be made a clone's: "+format, args...).
			WithHint("clone its disks one by one, and write the launch command of the new VM by hand")
	}
}

// driveName is what a drive is called.
func driveName(d discover.Drive) string {
	for _, name := range []string{d.Device, d.ID, d.Node, d.File} {
		if name != "" {
			return name
		}
	}
	return "without a name"
}

// followNodes finds out what becomes of the nodes below those that drives are
// made of: what -blockdev says in several options is one drive.
func (r *cloning) followNodes(options []discover.Option) {
	for _, o := range options {
		if o.Name == "blockdev" {
			a := readArgument(o.Arg, "driver")
			r.nodes[a.value("node-name")] = a
		}
	}
	for _, f := range r.drives {
		for node, seen := f.drive.Node, 0; seen <= len(r.nodes); seen++ {
			a, ok := r.nodes[node]
			if !ok {
				break
			}
			r.below[node] = f
			if node, ok = a.get("file"); !ok {
				break
			}
		}
	}
}

// drive is an option that makes a drive or a part of one.
func (r *cloning) drive(o discover.Option) (arg string, keep bool) {
	if o.Name == "blockdev" {
		return r.blockdev(o.Arg)
	}
	f := r.nextDrive()
	a := argument{parts: []part{{key: "file", value: o.Arg}}}
	short, is := shortForms[o.Name]
	if !is {
		a = readArgument(o.Arg, "")
	}
	if id, ok := a.get("id"); f == nil || ok && id != f.drive.ID {
		r.fail("its drives cannot be told apart at %s", o.Arg)
		return o.Arg, true
	}
	switch {
	case f.omitted:
		return "", false
	case f.file == "" && !f.firmware:
		return o.Arg, true
	case is: // the format is to be declared, which only -drive can
		file, format := r.fileOf(f, o.Arg)
		if format == "" {
			return file, true
		}
		r.out.Command = append(r.out.Command, "-drive", "file="+escape(file)+",format="+format+","+short)
		return "", false
	}
	r.lead(&a, f)
	return a.String(), true
}

// nextDrive returns the next drive that an option of its own makes.
func (r *cloning) nextDrive() *fate {
	for r.next < len(r.drives) {
		f := r.drives[r.next]
		r.next++
		if f.drive.Node == "" || r.below[f.drive.Node] != f {
			return f
		}
	}
	return nil
}

// fileOf returns the file that a drive has in the clone, and its format, "" for
// the one that the origin's has.
func (r *cloning) fileOf(f *fate, path string) (file, format string) {
	if !f.firmware {
		return f.file, "qcow2"
	}
	if f.drive.Format != "" && f.drive.Format != "raw" {
		return r.claim(path, "firmware variables in the format %s are not copied", f.drive.Format), ""
	}
	if now, ok := r.Replace[path]; ok {
		return now, ""
	}
	file, err := r.Firmware(path)
	if err != nil && r.err == nil {
		r.err = err
	}
	r.variables = append(r.variables, file)
	return file, ""
}

// lead gives -drive another file.
func (r *cloning) lead(a *argument, f *fate) {
	key := "file"
	if _, ok := a.get("file.filename"); ok {
		key = "file.filename"
	}
	path := a.value(key)
	file, format := r.fileOf(f, strings.TrimPrefix(path, "file:"))
	a.set(key, file)
	if format == "" {
		return
	}
	formatKey := "format"
	if _, ok := a.get("driver"); ok {
		formatKey = "driver"
	}
	a.set(formatKey, format)
	if _, ok := a.get("file.driver"); ok {
		a.set("file.driver", "file")
	}
	r.plain(a)
}

// blockdev is -blockdev: the node of the format, that of the file, or both.
func (r *cloning) blockdev(arg string) (string, bool) {
	a := readArgument(arg, "driver")
	name := a.value("node-name")
	f := r.below[name]
	switch {
	case f == nil || f.file == "" && !f.firmware && !f.omitted:
		return arg, true
	case f.omitted:
		return "", false
	}
	for _, at := range []string{"", "file.", "file.file."} {
		path, ok := a.get(at + "filename")
		if !ok {
			continue
		}
		file, format := r.fileOf(f, path)
		a.set(at+"filename", file)
		if format == "" {
			continue
		}
		a.set(at+"driver", "file")
		if at == "" && name == f.drive.Node {
			r.fail("drive %s has no node of a format", driveName(f.drive))
		}
	}
	if f.firmware {
		return a.String(), true
	}
	if _, below := a.get("file.file.filename"); below { // the format under a filter
		a.set("file.driver", "qcow2")
		return a.String(), true
	}
	_, whole := a.get("file.filename")
	leaf := r.nodes[a.value("file")]
	if _, over := leaf.get("filename"); whole || over {
		a.set("driver", "qcow2")
		r.plain(&a)
	}
	return a.String(), true
}

// plain refuses a window of a file: that of the clone begins at its beginning.
func (r *cloning) plain(a *argument) {
	for _, key := range []string{"offset", "size", "file.offset", "file.size"} {
		if v, ok := a.get(key); ok {
			r.fail("a drive is a part of its file (%s=%s)", key, v)
		}
	}
}

// verify reads the command line again, as it will be read: no drive that the clone
// writes to may be its origin's.
func (r *cloning) verify() error {
	if len(r.out.Used) < len(r.Disks) {
		r.fail("it does not name all of its disks")
		return r.err
	}
	p, err := discover.ParseCommandLine(r.out.Command)
	if err != nil {
		return err
	}
	own := map[string]bool{}
	for _, file := range r.Disks {
		own[file] = true
	}
	for _, file := range r.Replace {
		own[file] = true
	}
	for _, file := range r.variables {
		own[file] = true
	}
	for _, d := range p.Drives {
		writes := !d.ReadOnly && !d.CDROM && !d.Snapshot && (d.File != "" || d.Protocol != "")
		if writes && !own[d.File] {
			r.fail("the clone would write to the drive %s of its origin", driveName(d))
		}
	}
	return r.err
}
