package launch

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// asClone is what the tests make clones of: VM web2 of web.
func asClone(disks map[string]string, replace ...string) Clone {
	macs := 0
	c := Clone{
		Origin: "web", Name: "web2", UUID: "u2", Generation: "g2", Disks: disks, Replace: map[string]string{},
		MAC:         func() string { macs++; return fmt.Sprintf("02:00:00:00:00:%02x", macs) },
		Firmware:    func(path string) (string, error) { return "/v/web2-" + filepath.Base(path), nil },
		IsDirectory: func(path string) bool { return path == "/dev/hugepages" },
	}
	for _, r := range replace {
		old, now, _ := strings.Cut(r, "=")
		c.Replace[old] = now
	}
	return c
}

func TestClone(t *testing.T) {
	root := map[string]string{"root": "/v/web2-root.qcow2"}
	for _, c := range []struct {
		name, command, want string
		disks               map[string]string
		replace             []string
	}{
		{"identity", "q -name guest=web,debug-threads=on -uuid U -smbios type=1,uuid=U,serial=S", "q -name guest=web2,debug-threads=on -smbios type=1,uuid=u2,serial=S -uuid u2", nil, nil},
		{"no identity", "q -m 64 -S", "q -m 64 -S -name web2 -uuid u2", nil, nil},
		{"it was restored", "q -name web -incoming defer -S", "q -name web2 -uuid u2", nil, nil},
		{"a state of its own", "q -name web -loadvm x", "q -name web2 -uuid u2", nil, nil},
		{"a drive", "q -name web -drive file=/v/web-root.raw,if=none,id=d0,format=raw,cache=none -device virtio-blk-pci,drive=d0,id=root",
			"q -name web2 -drive file=/v/web2-root.qcow2,if=none,id=d0,format=qcow2,cache=none -device virtio-blk-pci,drive=d0,id=root -uuid u2", root, nil},
		{"a drive that is probed", "q -name web -drive file=/v/r,id=root", "q -name web2 -drive file=/v/web2-root.qcow2,id=root,format=qcow2 -uuid u2", root, nil},
		{"a drive's long form", "q -name web -drive file.filename=/dev/vg/r,file.driver=host_device,driver=raw,id=root",
			"q -name web2 -drive file.filename=/v/web2-root.qcow2,file.driver=file,driver=qcow2,id=root -uuid u2", root, nil},
		{"others are left out", "q -name web -drive file=/v/a.qcow2,id=root,if=none -drive file=/v/b,id=b,if=none -device virtio-blk,drive=b -device virtio-blk,drive=root -cdrom /v/cd.iso",
			"q -name web2 -drive file=/v/web2-root.qcow2,id=root,if=none,format=qcow2 -device virtio-blk,drive=root -cdrom /v/cd.iso -uuid u2", root, nil},
		{"short forms", "q -name web -hda /v/a.qcow2", "q -name web2 -drive file=/v/x,,y,format=qcow2,index=0,media=disk -uuid u2", map[string]string{"/v/a.qcow2": "/v/x,y"}, nil},
		{"no option", "q -name web /v/a.qcow2", "q -name web2 -drive file=/v/x,format=qcow2,index=0,media=disk -uuid u2", map[string]string{"/v/a.qcow2": "/v/x"}, nil},
		{"nodes", "q -name web -blockdev driver=file,filename=/v/r.raw,node-name=f -blockdev driver=raw,file=f,node-name=fmt -device virtio-blk,drive=fmt,id=root",
			"q -name web2 -blockdev driver=file,filename=/v/web2-root.qcow2,node-name=f -blockdev driver=qcow2,file=f,node-name=fmt -device virtio-blk,drive=fmt,id=root -uuid u2", root, nil},
		{"a node under a filter", "q -name web -blockdev driver=throttle,node-name=t,file.driver=raw,file.file.driver=file,file.file.filename=/v/r -device virtio-blk,drive=t,id=root",
			"q -name web2 -blockdev driver=throttle,node-name=t,file.driver=qcow2,file.file.driver=file,file.file.filename=/v/web2-root.qcow2 -device virtio-blk,drive=t,id=root -uuid u2", root, nil},
		{"a node in JSON", `q -name web -blockdev {"driver":"raw","file":{"driver":"file","filename":"/v/r"},"node-name":"fmt"} -device {"driver":"virtio-blk","drive":"fmt","id":"root"}`,
			`q -name web2 -blockdev {"driver":"qcow2","file":{"driver":"file","filename":"/v/web2-root.qcow2"},"node-name":"fmt"} -device {"driver":"virtio-blk","drive":"fmt","id":"root"} -uuid u2`, root, nil},
		{"firmware", "q -name web -drive if=pflash,format=raw,readonly=on,file=/usr/code.fd -drive if=pflash,format=raw,file=/v/vars.fd",
			"q -name web2 -drive if=pflash,format=raw,readonly=on,file=/usr/code.fd -drive if=pflash,format=raw,file=/v/web2-vars.fd -uuid u2", nil, nil},
		{"cards", "q -name web -netdev user,id=n -device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56 -device e1000 -nic user,model=e1000 -net nic",
			"q -name web2 -netdev user,id=n -device virtio-net-pci,netdev=n,mac=02:00:00:00:00:01 -device e1000,mac=02:00:00:00:00:02 -nic user,model=e1000,mac=02:00:00:00:00:03 -net nic,macaddr=02:00:00:00:00:04 -uuid u2", nil, nil},
		{"generation", "q -name web -device vmgenid,guid=auto", "q -name web2 -device vmgenid,guid=g2 -uuid u2", nil, nil},
		{"sockets", "q -name web -qmp unix:/run/web.qmp,server,nowait -chardev socket,id=a,path=/run/qga.sock,server=on,wait=off -monitor stdio -serial mon:unix:x/web/s,server=on -pidfile /run/web.pid -D web.log",
			"q -name web2 -qmp unix:/run/web2.qmp,server,nowait -chardev socket,id=a,path=/run/web2-qga.sock,server=on,wait=off -monitor stdio -serial mon:unix:x/web/web2-s,server=on -pidfile /run/web2.pid -D web2.log -uuid u2", nil, nil},
		{"displays", "q -name web -vnc unix:/run/web.vnc -spice unix=on,addr=/run/s -display none", "q -name web2 -vnc unix:/run/web2.vnc -spice unix=on,addr=/run/web2-s -display none -uuid u2", nil, nil},
		{"replaced", "q -name web -vnc :1,password=on -netdev tap,ifname=tap0,id=n -device vfio-pci,host=01:00.0", "q -name web2 -vnc :4,password=on -netdev tap,ifname=tap4,id=n -device vfio-pci,host=02:00.0 -uuid u2", nil,
			[]string{":1=:4", "tap0=tap4", "01:00.0=02:00.0"}},
		{"memory in huge pages", "q -name web -mem-path /dev/hugepages -object memory-backend-file,id=m,mem-path=/dev/hugepages", "q -name web2 -mem-path /dev/hugepages -object memory-backend-file,id=m,mem-path=/dev/hugepages -uuid u2", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Machine{Command: strings.Fields(c.command)}.Clone(asClone(c.disks, c.replace...))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Fields(c.want), got.Command); diff != "" {
				t.Error(diff)
			}
			if len(got.Used) != len(c.disks) {
				t.Errorf("disks found: %q", got.Used)
			}
		})
	}
}

// What two VMs cannot both have is refused by name.
func TestCloneRefuses(t *testing.T) {
	for command, want := range map[string]string{
		"-netdev tap,ifname=tap0,id=n":                                          "tap0",
		"-nic tap,ifname=tap0":                                                  "tap0",
		"-netdev user,id=n,hostfwd=tcp::2222-:22":                               "tcp::2222-:22",
		`-netdev {"type":"user","id":"n","hostfwd":[{"str":"tcp::2222-:22"}]}`:  "tcp::2222-:22",
		"-netdev socket,id=n,listen=:1234":                                      ":1234",
		"-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0":                    "/dev/vhost-vdpa-0",
		"-netdev stream,id=n,server=on,addr.type=inet,addr.host=h,addr.port=99": "99",
		"-vnc :1":                                      ":1",
		"-display vnc=:1":                              ":1",
		"-spice port=5900":                             "5900",
		"-device vfio-pci,host=01:00.0":                "01:00.0",
		"-device vhost-vsock-pci,guest-cid=3":          "guest-cid",
		"-device usb-host,hostbus=1,hostaddr=2":        "hostbus",
		"-chardev socket,id=tpm,path=/run/swtpm":       "/run/swtpm",
		"-chardev socket,id=c,host=h,port=7,server=on": "listens",
		"-qmp tcp:localhost:4444,server=on":            "localhost:4444",
		"-serial /dev/ttyS0":                           "/dev/ttyS0",
		"-gdb tcp::1234":                               ":1234",
		"-s":                                           "gdb",
		"-readconfig /etc/vm.conf":                     "/etc/vm.conf",
		"-device e1000,id=n -set device.n.mac=52:54:00:12:34:56":                  "-set",
		"-mem-path /dev/shm/web":                                                  "/dev/shm/web",
		"-object memory-backend-file,id=m,mem-path=/dev/shm/web":                  "/dev/shm/web",
		"-tpmdev passthrough,id=t,path=/dev/tpm0":                                 "/dev/tpm0",
		"-drive if=pflash,format=qcow2,file=/v/vars.qcow2":                        "/v/vars.qcow2",
		"-drive file=/v/r,id=root,backing.file.filename=/v/b":                     "lies on",
		"-blockdev driver=file,filename=/v/r,node-name=root -device x,drive=root": "no node of a format",
	} {
		disks := map[string]string{}
		if strings.Contains(command, "root") {
			disks["root"] = "/v/x"
		}
		_, err := Machine{Command: append([]string{"q", "-name", "web"}, strings.Fields(command)...)}.Clone(asClone(disks))
		if fault.Of(err) != fault.Unsupported || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", command, err)
		}
	}
	long := strings.Repeat("x", 100)
	if _, err := (Machine{Command: []string{"q", "-qmp", "unix:/run/" + long + ",server"}}).Clone(asClone(nil)); fault.Of(err) != fault.Usage {
		t.Error(err)
	}
}

func TestRename(t *testing.T) {
	for base, want := range map[string]string{
		"web.sock": "web2.sock", "qmp-web": "qmp-web2", "webmail.sock": "web2-webmail.sock", "q": "web2-q", "cobweb-web.s": "cobweb-web2.s",
	} {
		if got := rename(base, "web", "web2"); got != want {
			t.Errorf("%s: %s", base, got)
		}
	}
}

// FuzzClone: whatever command line a process shows, that of its clone is of
// another VM, writes to none of its files, and listens at none of its sockets.
func FuzzClone(f *testing.F) {
	files, err := filepath.Glob("../discover/testdata/cmdline/*.args")
	if err != nil || len(files) == 0 {
		f.Fatal("no command lines", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bytes.Join(bytes.Split(bytes.TrimSpace(b), []byte("\n")), []byte{0}))
	}
	f.Add([]byte("q\x00-drive\x00file=a,,b,id=root\x00-device\x00e1000,mac=52:54:00:12:34:56\x00-qmp\x00unix:/q,server"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m := Machine{Command: strings.Split(string(data), "\x00")}
		before, err := discover.ParseCommandLine(m.Command)
		if err != nil {
			return
		}
		disks := map[string]string{}
		for _, d := range before.Drives {
			if d.Device != "" && !d.ReadOnly && !d.CDROM && d.Interface != "pflash" {
				disks[d.Device] = "/clone/" + fmt.Sprint(len(disks))
			}
		}
		got, err := m.Clone(asClone(disks))
		if err != nil {
			return
		}
		after, err := discover.ParseCommandLine(got.Command)
		if err != nil {
			t.Fatalf("%q: %v", got.Command, err)
		}
		if after.Name != "web2" || after.UUID != "u2" || after.Incoming != "" {
			t.Errorf("%q: %+v", got.Command, after)
		}
		for _, d := range after.Drives {
			if d.ReadOnly || d.CDROM || d.Snapshot || d.File == "" {
				continue
			}
			if slices.ContainsFunc(before.Drives, func(o discover.Drive) bool { return o.File == d.File }) {
				t.Errorf("both write to %q:\n%q\n%q", d.File, m.Command, got.Command)
			}
		}
		for _, q := range after.QMP {
			if slices.ContainsFunc(before.QMP, func(o discover.Socket) bool { return o.Path == q.Path }) {
				t.Errorf("both listen at %q:\n%q\n%q", q.Path, m.Command, got.Command)
			}
		}
		if len(after.QMP) != len(before.QMP) {
			t.Errorf("%d QMP sockets, not %d:\n%q\n%q", len(after.QMP), len(before.QMP), m.Command, got.Command)
		}
	})
}
