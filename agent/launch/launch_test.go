package launch

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
)

func TestIncoming(t *testing.T) {
	for _, c := range []struct {
		name, command, machine, want string
	}{
		{"an alias is pinned", "qemu -M pc,accel=kvm -m 64", "pc-i440fx-7.2", "/usr/bin/qemu -M pc,accel=kvm -m 64 -machine type=pc-i440fx-7.2 -incoming defer -S"},
		{"no machine", "qemu -m 64", "pc-i440fx-7.2", "/usr/bin/qemu -m 64 -machine type=pc-i440fx-7.2 -incoming defer -S"},
		{"a version stays", "qemu -machine pc-q35-7.2", "pc-q35-7.2", "/usr/bin/qemu -machine pc-q35-7.2 -incoming defer -S"},
		{"what it waited for before", "qemu -S --incoming tcp:0:4444 -m 64", "", "/usr/bin/qemu -m 64 -incoming defer -S"},
		{"a state of its own", "qemu -loadvm x -preconfig -name -S", "", "/usr/bin/qemu -name -S -incoming defer -S"},
		{"restored before", "/usr/bin/qemu -M pc -machine type=pc-i440fx-7.2 -incoming defer -S", "pc-i440fx-7.2", "/usr/bin/qemu -M pc -machine type=pc-i440fx-7.2 -incoming defer -S"},
		{"it daemonizes", "qemu -daemonize -pidfile x.pid disk.img", "", "/usr/bin/qemu -daemonize -pidfile x.pid disk.img -incoming defer -S"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := Machine{Command: strings.Fields(c.command), Binary: "/usr/bin/qemu", Type: c.machine}
			got, err := m.Incoming()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Fields(c.want), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestBooting(t *testing.T) {
	for command, want := range map[string]string{
		"qemu -S -m 64":                 "qemu -S -m 64",
		"qemu -m 64 -incoming defer -S": "qemu -m 64",
	} {
		got, err := Machine{Command: strings.Fields(command)}.Booting()
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %v, %v", command, got, err)
		}
	}
}

func TestUnstartable(t *testing.T) {
	for arg, want := range map[string]bool{
		"tap,id=n0,fd=24": true, "tap,fds=3:4,vhostfds=5:6": true, "fd=3,set=2": true, "file=/dev/fdset/2": true,
		`{"type":"tap","fd":"24"}`: true, `{"type":"tap","ifname":"t0"}`: false, "tap,ifname=tap0": false, "file=/a/fd=x": false, "{": false,
	} {
		if got := (Machine{Command: []string{"qemu", "-x", arg}}).Unstartable(); len(got) > 0 != want {
			t.Errorf("%s: %q", arg, got)
		}
	}
	m := Machine{Command: []string{"qemu", "-netdev", "tap,fd=3"}}
	if _, err := Choose(t.Context(), m, Automatic, 0); fault.Of(err) != fault.Unsupported || !strings.Contains(fault.Hint(err), "external") {
		t.Errorf("started by us: %v", err)
	}
	if k, err := Choose(t.Context(), m, External, 0); err != nil || k != External {
		t.Errorf("external: %v, %v", k, err)
	}
	if len(Machine{Foreign: true}.Unstartable()) == 0 {
		t.Error("a container's QEMU is started outside of it")
	}
}

// The specification that a controller gets is JSON, and says all that it needs.
func TestSpec(t *testing.T) {
	m := Machine{
		Command: strings.Fields("qemu -netdev tap,ifname=tap0,id=n0 -chardev socket,path=/tpm.sock,id=c0 -pidfile vm.pid -daemonize"),
		Binary:  "/usr/bin/qemu", Directory: "/srv/vm", UID: 64055, GID: 108, Groups: []int{36}, Unit: "vm@web.service", Slice: "machine.slice",
	}
	s, err := New(Order{Machine: m, Launcher: External, Operation: "0a", VM: "web", UUID: "u"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"uid":64055`, `"directory":"/srv/vm"`, `"pid_file":"/srv/vm/vm.pid"`, `"forks":true`, `ifname=tap0`, `/tpm.sock`, `"launcher":"external"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is not in %s", want, b)
		}
	}
	m.Command = append(m.Command, "-runas", "nobody")
	if s, err = New(Order{Machine: m, Launcher: Unit}); err != nil || s.UID != 0 || s.Unit != "vm@web.service" {
		t.Errorf("a QEMU that drops its privileges by itself: %+v, %v", s, err)
	}
	text := s.dropIn("notify")
	for _, want := range []string{"ExecStart=\nExecStart=\"/usr/bin/qemu\" ", "Type=forking\n", "Restart=no\n", "WorkingDirectory=/srv/vm\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
}

func TestParseKind(t *testing.T) {
	for _, k := range append(slices.Clone(Kinds), Automatic, "auto") {
		if _, err := ParseKind(string(k)); err != nil {
			t.Error(err)
		}
	}
	if _, err := ParseKind("docker"); fault.Of(err) != fault.Usage {
		t.Error(err)
	}
}

// FuzzIncoming: whatever command line a process shows, what is started instead
// waits for its memory, is the same VM with the same drives and sockets, and is
// the same when it is made again.
func FuzzIncoming(f *testing.F) {
	files, err := filepath.Glob("../discover/testdata/cmdline/*.args")
	if err != nil || len(files) == 0 {
		f.Fatal("no command lines", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bytes.Join(bytes.Split(bytes.TrimSpace(b), []byte("\n")), []byte{0}), "pc-i440fx-7.2")
		f.Add(bytes.Join(bytes.Split(bytes.TrimSpace(b), []byte("\n")), []byte{0}), "")
	}
	f.Fuzz(func(t *testing.T, data []byte, machine string) {
		if strings.ContainsAny(machine, ",=\x00{") {
			return // QEMU's own names have none of them
		}
		m := Machine{Command: strings.Split(string(data), "\x00"), Type: machine}
		before, err := discover.ParseCommandLine(m.Command)
		if err != nil {
			return
		}
		args, err := m.Incoming()
		if err != nil {
			t.Fatalf("%q: %v", m.Command, err)
		}
		after, err := discover.ParseCommandLine(args)
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		if after.Incoming != "defer" || !after.StartPaused || machine != "" && after.Machine != machine {
			t.Errorf("%q: %+v", args, after)
		}
		if machine != "" { // what a drive is plugged into depends on it
			for _, p := range []*discover.Process{&before, &after} {
				for i := range p.Drives {
					p.Drives[i].ID, p.Drives[i].Interface = "", ""
				}
			}
		}
		if after.Name != before.Name || after.UUID != before.UUID || !cmp.Equal(after.Drives, before.Drives) || !cmp.Equal(after.QMP, before.QMP) {
			t.Errorf("another VM:\n%q\n%q", m.Command, args)
		}
		again, err := Machine{Command: args, Type: machine}.Incoming()
		if err != nil || !slices.Equal(args, again) {
			t.Errorf("made again, %v:\n%q\n%q", err, args, again)
		}
	})
}

// A QEMU that cannot start says why.
func TestExecFails(t *testing.T) {
	s := Spec{Operation: "0a", VM: "web", Launcher: Exec, Command: []string{"/bin/sh", "-c", "echo no such machine >&2; exit 3"}, Log: t.TempDir() + "/log"}
	l, err := s.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	<-l.ended
	if err := l.Failed(t.Context()); err == nil || !strings.Contains(err.Error(), "no such machine") {
		t.Error(err)
	}
	if err := errors.Join(s.Clear(t.Context()), s.Clear(t.Context())); err != nil {
		t.Error(err)
	}
	s.Command = []string{"/no/such/qemu"}
	if _, err := s.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "/no/such/qemu") {
		t.Error(err)
	}
}

// A child of a user without rights cannot be another user's QEMU.
func TestExecUser(t *testing.T) {
	m := Machine{Command: []string{"qemu"}, UID: os.Geteuid() + 1}
	if err := m.canExec(); (err == nil) != (os.Geteuid() == 0) {
		t.Error(err)
	}
	m.UID = os.Geteuid()
	if err := m.canExec(); err != nil {
		t.Error(err)
	}
}
