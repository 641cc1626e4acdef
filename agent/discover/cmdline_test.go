package discover

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func readArgs(t testing.TB, file string) []string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

func TestRecordedCommandLines(t *testing.T) {
	files, err := filepath.Glob("testdata/cmdline/*.args")
	if err != nil || len(files) < 6 {
		t.Fatalf("recorded command lines: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".args"), func(t *testing.T) {
			args := readArgs(t, file)
			p, err := ParseCommandLine(args)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(args, p.Args); diff != "" {
				t.Errorf("arguments changed: %s", diff)
			}
			p.Args = nil
			got, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".args") + ".golden"
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)+"\n"); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestParseSettings(t *testing.T) {
	tests := []struct {
		arg, implied string
		want         settings
	}{
		{"file=a,,b.qcow2,id=x", "", settings{{"file", "a,b.qcow2"}, {"id", "x"}}},
		{"file=a,,,id=x", "", settings{{"file", "a,"}, {"id", "x"}}},
		{"file=a=b,,c=d", "", settings{{"file", "a=b,c=d"}}},
		{"guest,,1,process=p", "guest", settings{{"guest", "guest,1"}, {"process", "p"}}},
		{"/p,server,nowait", "path", settings{{"path", "/p"}, {"server", "on"}, {"wait", "off"}}},
		{"server,nowait", "", settings{{"server", "on"}, {"wait", "off"}}},
		{"a=1,", "", settings{{"a", "1"}}},
		{"a=", "", settings{{"a", ""}}},
		{"", "x", nil},
		{`{"a":{"b":[true,"x,y",null]},"n":9007199254740993}`, "",
			settings{{"a.b.0", "on"}, {"a.b.1", "x,y"}, {"a.b.2", ""}, {"n", "9007199254740993"}}},
	}
	for _, tt := range tests {
		got, err := parseSettings(tt.arg, tt.implied)
		if err != nil {
			t.Errorf("%q: %v", tt.arg, err)
		}
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(setting{}), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%q: %s", tt.arg, diff)
		}
	}
	for _, arg := range []string{"{", `{"a"`, `{"a":1} x`, `{"a":1}{}`, strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100)} {
		if got, err := parseSettings(arg, ""); err == nil {
			t.Errorf("%.20q: got %v, want an error", arg, got)
		}
	}
}

func TestCommandLineErrors(t *testing.T) {
	tests := [][]string{
		nil,
		{"qemu-system-x86_64", "-name"},
		{"qemu-system-x86_64", "-device", "{bad"},
		{"qemu-system-x86_64", "-set", "drive.x=y"},
	}
	for _, args := range tests {
		if _, err := ParseCommandLine(args); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
	if _, err := ParseCommandLine(nil); !errors.Is(err, ErrNoArguments) {
		t.Errorf("no arguments: %v", err)
	}
}

func TestQuestions(t *testing.T) {
	tests := map[string]bool{
		"-version": true, "--help": true, "-device help": true, "-cpu ?": true,
		"-device virtio-blk-pci,help": true, "-machine help": true,
		"-M none -S -qmp unix:/var/lib/libvirt/qemu/qmp-AbC/qmp.monitor,server=on": true,
		"-name help": false, "-append help": false, "-hda help": false,
		"-drive file=help,if=none": false, "-qmp unix:/run/qmp.monitor,server=on": false,
	}
	for text, want := range tests {
		p, err := ParseCommandLine(append([]string{"qemu-system-x86_64"}, strings.Fields(text)...))
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if p.question != want {
			t.Errorf("%s: a question: %v, want %v", text, p.question, want)
		}
	}
}

func TestDriveNames(t *testing.T) {
	tests := []struct {
		args string
		want []string
	}{
		{"-hda a -cdrom b -drive file=c", []string{"ide0-hd0", "ide1-cd0", "ide0-hd1"}},
		{"-M q35 -hda a -cdrom b -drive file=c", []string{"ide0-hd0", "ide2-cd0", "ide1-hd0"}},
		{"-M pc-q35-9.2 -drive file=a,if=virtio -drive file=b,if=virtio,id=x -drive file=c,if=virtio", []string{"virtio0", "x", "virtio2"}},
		{"-drive file=a,if=scsi,index=8 -drive file=b,if=floppy -drive file=c,if=pflash", []string{"scsi1-hd1", "floppy0", "pflash0"}},
		{"-M none -drive file=a,if=none", []string{"none0"}},
		{"-M microvm -drive file=a", []string{""}},
		{"-M virt -drive file=a", []string{"virtio0"}},
	}
	for _, tt := range tests {
		p, err := ParseCommandLine(append([]string{"qemu-system-x86_64"}, strings.Fields(tt.args)...))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, d := range p.Drives {
			got = append(got, d.ID)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", tt.args, diff)
		}
	}
}

func TestParseMemory(t *testing.T) {
	for text, want := range map[string]uint64{
		"128": 128 << 20, "2G": 2 << 30, "1.5g": 3 << 29, "512k": 512 << 10, "4096B": 4096,
		"1T": 1 << 40, "": 0, "G": 0, "-1": 0, "nan": 0, "inf": 0, "99999999E": 0, "x": 0,
	} {
		if got := parseMemory(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

func TestLibvirtEvidence(t *testing.T) {
	tests := map[string]bool{
		"-name guest=a,debug-threads=on -drive file=/var/lib/libvirt/images/a.qcow2":                   false,
		"-chardev socket,id=charmonitor,path=/run/mine,server=on":                                      false,
		"-chardev socket,id=charmonitor,fd=31,server=on -mon chardev=charmonitor,mode=control":         true,
		"-chardev socket,id=m,path=/var/lib/libvirt/qemu/domain-1-a/monitor.sock,server=on":            true,
		"-object secret,id=masterKey0,file=/home/u/.config/libvirt/qemu/lib/domain-1-a/master-key.aes": true,
		"-chardev socket,id=m,path=/run/user/1000/libvirt/qemu/run/channel/1-a/org.qemu,server=on":     false,
		"-drive file=/backup/libvirt/qemu/domain-a/disk.qcow2":                                         false,
	}
	for text, want := range tests {
		p, err := ParseCommandLine(append([]string{"kvm"}, strings.Fields(text)...))
		if err != nil {
			t.Fatal(err)
		}
		if p.Libvirt != want || p.Libvirt != (p.LibvirtEvidence != "") {
			t.Errorf("%s: %v (%s), want %v", text, p.Libvirt, p.LibvirtEvidence, want)
		}
	}
}

// TestHostileCommandLines has the longest command lines of the worst shapes: a
// QEMU that was taken over can execute itself with any. They take no longer
// than a scan may.
func TestHostileCommandLines(t *testing.T) {
	repeat := func(n int, args ...string) []string {
		out := []string{"qemu-system-x86_64"}
		for range n {
			out = append(out, args...)
		}
		return out
	}
	keys := strings.Repeat("a=,", 1500)
	tests := map[string][]string{
		"sets":      append(repeat(1<<13, "-drive", "id=x"), repeat(1<<13-1, "-set", "drive.x.a=b")[1:]...),
		"drives":    repeat(1<<14, "-drive", "if=virtio"),
		"devices":   append(repeat(1<<13, "-drive", "id=x,if=none"), repeat(1<<13, "-device", "d,drive=y,bus=z.0")[1:]...),
		"wide node": append(repeat(1, "-blockdev", keys+"node-name=w,driver=throttle,file=w"), repeat(1<<14-1, "-blockdev", "driver=throttle,file=w")[1:]...),
		"too many":  repeat(1<<20, "-S"),
		"commas":    {"qemu-system-x86_64", "-drive", strings.Repeat(",", 4<<20)},
		"deep json": {"qemu-system-x86_64", "-device", strings.Repeat(`{"a":`, 1<<19)},
	}
	for name, args := range tests {
		began := time.Now()
		_, err := ParseCommandLine(args)
		took := time.Since(began)
		t.Logf("%s: %v, %v", name, took, err)
		if took > 10*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
	}
}

func FuzzParseCommandLine(f *testing.F) {
	files, err := filepath.Glob("testdata/cmdline/*.args")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		f.Add([]byte(strings.Join(readArgs(f, file), "\x00")))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var args []string
		for _, arg := range bytes.Split(data, []byte{0}) {
			args = append(args, string(arg))
		}
		p, err := ParseCommandLine(args)
		if err != nil {
			return
		}
		for _, s := range p.QMP {
			if s.Path == "" {
				t.Error("a monitor without a path")
			}
		}
		for _, d := range p.Drives {
			if d.File != "" && !isLocal(d.Protocol) {
				t.Errorf("drive %+v has a file and is not local", d)
			}
		}
		if p.Libvirt != (p.LibvirtEvidence != "") {
			t.Error("libvirt without evidence")
		}
	})
}
