package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// The bounds of what is read to rebuild a catalog.
const (
	maxManifest  = 64 << 20 // bytes of one file: thousands of layers
	maxManifests = 100000   // files of one directory
)

// manifests is what the manifests of some directories say.
type manifests struct {
	vms       map[string]vmManifest // by VM id, the one written last
	snapshots map[string]manifest   // by snapshot id
	skipped   []string              // what was not taken, and why
}

// read reads the manifests beside the layers in a directory. A directory
// without any is no error.
func (m *manifests) read(dir string) {
	path := filepath.Join(dir, manifestDir)
	if err := trusted(path, true); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			m.skip(path, err)
		}
		return
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		m.skip(path, err)
		return
	}
	defer func() { _ = root.Close() }()
	f, err := root.Open(".")
	if err != nil {
		m.skip(path, err)
		return
	}
	entries, err := f.ReadDir(maxManifests)
	_ = f.Close()
	if err != nil && !errors.Is(err, io.EOF) {
		m.skip(path, err)
		return
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		if err := m.readFile(root, filepath.Join(path, e.Name()), e.Name()); err != nil {
			m.skip(filepath.Join(path, e.Name()), err)
		}
	}
}

func (m *manifests) skip(path string, err error) {
	m.skipped = append(m.skipped, fmt.Sprintf("%s: %v", path, err))
}

// trusted fails for a file or directory that somebody else could have written: a
// manifest says which files to write to.
func trusted(path string, dir bool) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !ok || dir && !fi.IsDir() || !dir && !fi.Mode().IsRegular():
		return errors.New("it is neither a file nor a directory of vmsnapd's")
	case st.Uid != 0 && int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o022 != 0:
		return errors.New("somebody else may write to it, so that it cannot be trusted")
	}
	return nil
}

func (m *manifests) readFile(root *os.Root, path, name string) error {
	if err := trusted(path, false); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	_ = f.Close()
	if err != nil {
		return err
	}
	return m.take(name, data)
}

// take takes one manifest in, if it makes sense by itself.
func (m *manifests) take(name string, data []byte) error {
	if len(data) > maxManifest {
		return fmt.Errorf("it has more than %d bytes", maxManifest)
	}
	if id, ok := snapshotOf(name); ok {
		var s manifest
		if err := json.Unmarshal(data, &s); err != nil {
			return err
		}
		if s.Snapshot.ID != id {
			return fmt.Errorf("it is of the snapshot %q", s.Snapshot.ID)
		}
		if err := s.check(); err != nil {
			return err
		}
		m.snapshots[id] = s
		return nil
	}
	var v vmManifest
	if err := json.Unmarshal(data, &v); err != nil {
		return err
	}
	if name != vmManifestPrefix+v.VM.ID+".json" {
		return fmt.Errorf("it is of the VM %q", v.VM.ID)
	}
	if err := v.check(); err != nil {
		return err
	}
	if last, read := m.vms[v.VM.ID]; !read || v.Written.After(last.Written) {
		m.vms[v.VM.ID] = v
	}
	return nil
}

// recordID matches the ids that the catalog's records have.
var recordID = regexp.MustCompile(`^[0-9a-zA-Z][0-9a-zA-Z-]{0,63}$`)

func (m manifest) check() error {
	s := m.Snapshot
	if err := checkName(s.Name); err != nil {
		return err
	}
	if s.VMID != m.VM.ID {
		return fmt.Errorf("its snapshot is of the VM %q", s.VMID)
	}
	if s.Memory != nil && (!filepath.IsAbs(s.Memory.Path) || filepath.Clean(s.Memory.Path) != s.Memory.Path) {
		return fmt.Errorf("its memory is in %q", s.Memory.Path)
	}
	return checkRecords(m.Version, m.VM, m.Disks, m.Layers, append([]string{s.ID}, layersOf(s)...))
}

func (m vmManifest) check() error {
	if m.Preview != nil {
		if f := m.Preview.Former; f != nil && f.Memory != nil && (!filepath.IsAbs(f.Memory.Path) || filepath.Clean(f.Memory.Path) != f.Memory.Path) {
			return fmt.Errorf("the memory of the state before its preview is in %q", f.Memory.Path)
		}
		for _, d := range m.Preview.Disks {
			if layerOf(m.Layers, d.Before).ID == "" || layerOf(m.Layers, d.Trial).ID == "" {
				return fmt.Errorf("its preview has layers of disk %q that are not known", d.Device)
			}
		}
	}
	return checkRecords(m.Version, m.VM, m.Disks, m.Layers, m.Snapshots)
}

func layersOf(s catalog.Snapshot) (ids []string) {
	for _, d := range s.Disks {
		if d.LayerID != "" {
			ids = append(ids, d.LayerID)
		}
	}
	return ids
}

// checkRecords refuses records that the agent would not have made.
func checkRecords(version int, v catalog.VM, disks []catalog.Disk, layers []catalog.Layer, ids []string) error {
	if version != manifestVersion {
		return fmt.Errorf("it is of version %d, and not %d", version, manifestVersion)
	}
	if v.Identity == "" {
		return errors.New("its VM has no identity")
	}
	ids = append(ids, v.ID)
	known := map[string]bool{}
	for _, d := range disks {
		known[d.ID] = true
		ids = append(ids, d.ID)
		if d.VMID != v.ID || !filepath.IsAbs(d.LaunchPath) {
			return fmt.Errorf("its disk %q makes no sense", d.Device)
		}
	}
	parents := map[string]string{}
	for _, l := range layers {
		ids = append(ids, l.ID)
		if !known[l.DiskID] || !filepath.IsAbs(l.Path) || filepath.Clean(l.Path) != l.Path || l.Format == "" {
			return fmt.Errorf("its layer %q makes no sense", l.Path)
		}
		parents[l.ID] = l.Parent
	}
	for id := range parents {
		for steps, up := 0, parents[id]; up != ""; steps, up = steps+1, parents[up] {
			if steps > len(parents) {
				return errors.New("its layers lie on each other in a circle")
			}
		}
	}
	for _, id := range ids {
		if !recordID.MatchString(id) {
			return fmt.Errorf("it has the id %q", id)
		}
	}
	return nil
}
