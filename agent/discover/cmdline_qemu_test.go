package discover

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestQEMUFlagOptions asks QEMU which of its options take no argument: of two
// unknown options after such a one the first is refused by name, after the
// others it is their argument, and the second is refused.
func TestQEMUFlagOptions(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		help, err := exec.Command(q.Binary, "-help").Output()
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		for _, m := range regexp.MustCompile(`(?m)^-([a-zA-Z][a-zA-Z0-9-]*)`).FindAllStringSubmatch(string(help), -1) {
			names[m[1]] = true
		}
		for name := range flagOptions {
			names[name] = true
		}
		if len(names) < 100 {
			t.Fatalf("%d options in -help", len(names))
		}
		for name := range names {
			if flag, known := q.takesNoArgument(t, name); known && flag != flagOptions[name] {
				t.Errorf("-%s takes no argument: QEMU %v, here %v", name, flag, flagOptions[name])
			}
		}
	})
}

func (q qemu) takesNoArgument(t *testing.T, name string) (flag, known bool) {
	t.Helper()
	out, err := exec.Command(q.Binary, "-"+name, "-no-such-option", "-nor-this").CombinedOutput()
	switch text := string(out); {
	case err == nil: // it has printed what was asked for
		return true, true
	case strings.Contains(text, "-"+name+": invalid option"): // of another version
		return false, false
	case strings.Contains(text, "-no-such-option: invalid option"):
		return true, true
	case strings.Contains(text, "-nor-this: invalid option"):
		return false, true
	default:
		t.Errorf("-%s: %v: %s", name, err, text)
		return false, false
	}
}

// TestQEMUAgreesOnDrives compares what the command line is taken to say with
// what the QEMU that was started by it answers.
func TestQEMUAgreesOnDrives(t *testing.T) {
	tests := map[string][]string{
		"pc": {"-machine", "pc", "-hda", "a,b.raw", "-cdrom", "c.raw", "-drive", "file=d.raw,format=raw,if=virtio",
			"-drive", "file=e,,f.qcow2,if=none,id=named", "-device", "virtio-blk-pci,drive=named,id=dev"},
		"q35": {"-machine", "q35", "-hda", "a,b.raw", "-hdb", "c.raw", "-drive", "file=d.raw,format=raw,if=floppy",
			"-drive", "driver=qcow2,file.driver=file,file.filename=e,,f.qcow2,if=virtio"},
		"none": {"-machine", "none", "-drive", "file=d.raw,if=none,format=raw", "-drive", "file=c.raw,if=none,media=cdrom"},
		"blockdev": {"-machine", "pc",
			"-blockdev", `{"driver":"qcow2","node-name":"n1","file":{"driver":"file","filename":"e,f.qcow2"}}`,
			"-device", `{"driver":"virtio-blk-pci","drive":"n1","id":"dev1"}`,
			"-blockdev", "driver=raw,node-name=n2,file.driver=file,file.filename=a,,b.raw",
			"-device", "virtio-blk-pci,drive=n2,id=dev2"},
	}
	forEachQEMU(t, func(t *testing.T, q qemu) {
		for name, args := range tests {
			t.Run(name, func(t *testing.T) {
				w, dir := watch(t, Options{}), t.TempDir()
				makeImages(t, dir)
				cmd := q.command(slices.Concat([]string{"-accel", "tcg", "-S", "-display", "none", "-nodefaults",
					"-qmp", "unix:qmp,server=on,wait=off"}, args)...)
				cmd.Dir = dir
				startCmd(t, cmd)
				p := w.started(cmd.Process.Pid)
				if diff := cmp.Diff(askDrives(t, p), describedDrives(p)); diff != "" {
					t.Errorf("-QEMU +here\n%s", diff)
				}
			})
		}
	})
}

func makeImages(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"a,b.raw", "c.raw", "d.raw"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "e,f.qcow2", "1M")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
}

// driveFacts are what both sides know of a drive.
type driveFacts struct {
	File     string
	ReadOnly bool
}

// askDrives asks QEMU, by drive id or, without one, by device.
func askDrives(t *testing.T, p Process) map[string]driveFacts {
	t.Helper()
	q := greet(t, p, p.QMP[0])
	var none struct{}
	q.ask("qmp_capabilities", &none)
	var blocks []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted *struct {
			ReadOnly bool `json:"ro"`
			Image    struct {
				Filename string `json:"filename"`
			} `json:"image"`
		} `json:"inserted"`
	}
	q.ask("query-block", &blocks)
	out := map[string]driveFacts{}
	for _, b := range blocks {
		if b.Inserted == nil {
			continue
		}
		id := b.Device
		if id == "" {
			id = b.QDev[strings.LastIndexByte(strings.TrimSuffix(b.QDev, "/virtio-backend"), '/')+1:]
			id = strings.TrimSuffix(id, "/virtio-backend")
		}
		out[id] = driveFacts{p.absolute(b.Inserted.Image.Filename), b.Inserted.ReadOnly}
	}
	return out
}

func describedDrives(p Process) map[string]driveFacts {
	out := map[string]driveFacts{}
	for _, d := range p.Drives {
		id := d.ID
		if id == "" {
			id = d.Device
		}
		out[id] = driveFacts{d.File, d.ReadOnly}
	}
	return out
}
