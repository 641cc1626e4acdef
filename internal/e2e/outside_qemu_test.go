package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// bait makes a directory that nothing may touch, with a secret in it.
func bait(t *testing.T) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vs-bait-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.WriteFile(dir+"/secret", bytes.Repeat([]byte("s3cret\n"), 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// untouched fails if a path leads to the bait, or a file was made there.
func (h *host) untouched(all []touched, bait, when string) {
	h.t.Helper()
	for _, o := range all {
		if strings.HasPrefix(o.path, bait) {
			h.t.Errorf("%s: the bait was taken:\n%s", when, o.line)
		}
	}
	if left, err := os.ReadDir(bait); err != nil || len(left) != 1 {
		h.t.Errorf("%s: the bait's directory holds %v, %v", when, left, err)
	}
}

// TestQEMUAGuestsHeaderIsData has a guest write the header of a qcow2 image, over
// a file of the host, to its raw disk. Nobody takes it for a header: the disk is
// cut, settled, exported and cloned with it as data.
func TestQEMUAGuestsHeaderIsData(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		outside := bait(t)
		vm := newStill(t, q, "header", "root.raw")
		vm.kill()
		image := filepath.Join(t.TempDir(), "hostile.qcow2")
		img(t, q, "create", "-q", "-f", "qcow2", "-b", outside+"/secret", "-F", "raw", image)
		header, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		disk, err := os.OpenFile(vm.dir+"/root.raw", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := disk.Write(header); err != nil {
			t.Fatal(err)
		}
		if err := disk.Close(); err != nil {
			t.Fatal(err)
		}
		vm.start()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		copies := t.TempDir()
		all := h.touches(func() {
			h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
			vm.kill()
			h.settledRaw(vm, "stopped")
			h.must("snapshot", "create", vm.name, "two", "--quiesce", "none")
			h.settledRaw(vm, "cut when stopped")
			for _, name := range []string{"one", "two"} {
				h.must("snapshot", "export", vm.name+"/"+name, copies+"/"+name+".raw", "--disk", "root", "--format", "raw")
				h.must("snapshot", "clone", vm.name+"/"+name, copies+"/"+name+".qcow2", "--disk", "root", "--full")
			}
			h.must("doctor", vm.name)
		})
		h.untouched(all, outside, "a guest's header")
		h.staysWithin(all, "a guest's header", vm.dir, h.dir, filepath.Dir(h.socket), copies, binaries, os.TempDir()+"/vmsnap")
		for _, name := range []string{"one.raw", "two.raw"} {
			got, err := os.ReadFile(copies + "/" + name)
			if err != nil || !bytes.HasPrefix(got, header) {
				t.Errorf("%s does not begin with what the guest wrote: %v", name, err)
			}
		}
		h.private(vm)
	})
}

// private fails if somebody else could read what the daemon keeps to itself.
func (h *host) private(vm *still) {
	h.t.Helper()
	for _, dir := range []string{h.path("state"), vm.dir + "/.vmsnap"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := d.Info()
			if err != nil {
				return err
			}
			want := fs.FileMode(0o600)
			if d.IsDir() {
				want = 0o700
			}
			if fi.Mode().Perm() != want {
				h.t.Errorf("%s has the mode %s, want %s", path, fi.Mode().Perm(), want)
			}
			return nil
		})
		if err != nil {
			h.t.Fatal(err)
		}
	}
}

// tricks are strings that would lead somewhere if they were taken for paths,
// commands or options.
func tricks(bait string) []string {
	up := strings.Repeat("../", 12)
	few := []string{
		bait + "/x", up + bait[1:] + "/x", `json:{"driver":"file","filename":"` + bait + `/secret"}`, bait + "/x\x00.qcow2",
		"--output=" + bait + "/x", "$(touch " + bait + "/x)", "x,file=" + bait + "/secret", strings.Repeat(up, 80),
	}
	if !thorough() {
		return few
	}
	return append(few, "a/"+up+bait[1:]+"/secret", "file:"+bait+"/secret", "nbd:unix:"+bait+"/x", "`touch "+bait+"/x`",
		"\u202e../\x1b[31m\r\n", "", ".", "..")
}

// TestQEMUNoStringLeadsOut puts each trick into each string of each request of
// the API, whose other strings name what there is. Whatever the daemon answers,
// it lives, and nothing outside its own directories and the VM's is touched.
func TestQEMUNoStringLeadsOut(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		outside := bait(t)
		vm := newStill(t, q, "strings", "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		pid, calls := h.daemon.Process.Pid, 0
		all := h.touches(func() {
			eachUnary(func(m protoreflect.MethodDescriptor) {
				for _, field := range stringsOf(m.Input(), nil) {
					for _, trick := range tricks(outside) {
						h.tricked(vm, m, field, trick)
						calls++
					}
				}
			})
		})
		t.Logf("%d calls, %d paths", calls, len(all))
		if calls < 500 {
			t.Errorf("only %d calls", calls)
		}
		h.untouched(all, outside, "tricks")
		h.staysWithin(all, "tricks", vm.dir, h.dir, filepath.Dir(h.socket), binaries)
		if h.daemon.Process.Pid != pid {
			t.Error("the daemon has ended")
		}
		h.eventually(eventLimit, "what was begun has ended", h.idle)
		if h.run("preview", "show", vm.name).code == 0 { // one of the calls was good
			h.must("preview", "undo", vm.name)
		}
		vm.holds(1, "after all")
		h.noOrphans(vm, "after all")
		h.private(vm)
	})
}

// eachUnary goes through the methods of the API that answer once.
func eachUnary(f func(protoreflect.MethodDescriptor)) {
	protoregistry.GlobalFiles.RangeFilesByPackage("vmsnap.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				if m := methods.Get(j); !m.IsStreamingServer() && !m.IsStreamingClient() {
					f(m)
				}
			}
		}
		return true
	})
}

// stringsOf returns the ways to the strings of a message. Where a caller says
// what file to write to or which directories to read, it is obeyed as far as the
// kernel would let the caller: those are tested with package agent.
func stringsOf(m protoreflect.MessageDescriptor, above []protoreflect.FieldDescriptor) (ways [][]protoreflect.FieldDescriptor) {
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		way := append(above[:len(above):len(above)], f)
		switch {
		case f.Name() == "path" || f.Name() == "dir" || f.Name() == "dirs":
		case f.IsMap():
			ways = append(ways, way)
		case f.Kind() == protoreflect.StringKind:
			ways = append(ways, way)
		case f.Kind() == protoreflect.MessageKind && f.Message().ParentFile().Package() == "vmsnap.v1" && len(above) < 4:
			ways = append(ways, stringsOf(f.Message(), way)...)
		}
	}
	return ways
}

// tricked makes a call with a trick in one of its strings.
func (h *host) tricked(vm *still, m protoreflect.MethodDescriptor, way []protoreflect.FieldDescriptor, trick string) {
	h.t.Helper()
	msg := dynamicpb.NewMessage(m.Input())
	fillIn(msg, vm)
	at := protoreflect.Message(msg)
	for _, f := range way[:len(way)-1] {
		if f.IsList() {
			at = at.Mutable(f).List().AppendMutable().Message()
		} else {
			at = at.Mutable(f).Message()
		}
	}
	switch f, v := way[len(way)-1], protoreflect.ValueOfString(trick); {
	case f.IsMap():
		at.Mutable(f).Map().Set(v.MapKey(), v)
	case f.IsList():
		at.Mutable(f).List().Append(v)
	default:
		at.Set(f, v)
	}
	body, err := protojson.Marshal(msg)
	if err != nil {
		h.t.Fatal(err)
	}
	code, answer := h.post("/"+string(m.Parent().FullName())+"/"+string(m.Name()), body)
	var failure struct{ Code string }
	if code != http.StatusOK && (json.Unmarshal(answer, &failure) != nil || failure.Code == "internal" || failure.Code == "unavailable") {
		h.t.Errorf("%s with %s=%q: %d %s", m.Name(), way[len(way)-1].Name(), trick, code, answer)
	}
}

// fillIn names what there is in a request, and asks to do as little as possible.
func fillIn(msg protoreflect.Message, vm *still) {
	for name, value := range map[protoreflect.Name]any{
		"vm": vm.name, "snapshot": vm.name + "/one", "disk": "root", "schedule": "nightly", "name": "x", "new_name": "one",
		"strict": true, "dry_run": true, "path": vm.dir + "/nowhere/x.qcow2", "dir": vm.dir + "/nowhere",
	} {
		f := msg.Descriptor().Fields().ByName(name)
		if f == nil || f.IsList() || f.IsMap() || (f.Kind() == protoreflect.BoolKind) != (value == true) {
			continue
		}
		if f.Kind() == protoreflect.StringKind || f.Kind() == protoreflect.BoolKind {
			msg.Set(f, protoreflect.ValueOf(value))
		}
	}
}

// post posts JSON to the daemon.
func (h *host) post(procedure string, body []byte) (code int, answer []byte) {
	h.t.Helper()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.socket)
	}}}
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(h.ctx(), http.MethodPost, "http://vmsnapd"+procedure, bytes.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.Do(req)
	if err != nil {
		h.t.Fatalf("%s: %v\nvmsnapd's log:\n%s", procedure, err, h.log)
	}
	defer func() { _ = res.Body.Close() }()
	if answer, err = io.ReadAll(res.Body); err != nil {
		h.t.Fatal(fmt.Errorf("%s: %w", procedure, err))
	}
	return res.StatusCode, answer
}
