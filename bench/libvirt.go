package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// libvirt is a libvirtd of our own, in the mode for ordinary users: all it has
// and knows is in one directory, and the host's libvirt, if there is one, does
// not see it.
//
// libvirtd takes that mode if it is not root. It is not, in a user namespace,
// where root's files are its own all the same. In a process namespace it and all
// that it starts end with this process, however that ends.
type libvirt struct {
	dir   string
	alive io.Closer // libvirtd lives while this is open
	cmd   *exec.Cmd
	log   bytes.Buffer
}

// asNobody begins a command line that is run in a user namespace.
var asNobody = []string{"unshare", "--user", "--map-user=65534", "--map-group=65534", "--"}

// libvirtScript is process 1 of the process namespace: it collects what libvirtd
// leaves behind, and ends libvirtd when its standard input ends. Its arguments
// are the directory of the QEMU's modules and a command line.
//
// libvirt asks QEMU for all its types, for which that loads all its modules. One
// that is not installed would find those of the one that is, and abort.
const libvirtScript = `mount --bind "$1" ` + modulesDir + ` || exit
shift
exec 3<&0
"$@" & daemon=$!
{ read -r _ <&3; kill -KILL $daemon; } &
wait $daemon`

// modulesDir is where QEMU looks for its modules.
const modulesDir = "/usr/lib/x86_64-linux-gnu/qemu"

// modules returns the directory of the modules of a QEMU.
func modules(q testvm.QEMU) string {
	return filepath.Join(filepath.Dir(q.Binary), "..", "lib", "x86_64-linux-gnu", "qemu")
}

// libvirtDeadline is for a libvirtd that does not come up, and for a virsh that has
// little to do.
const libvirtDeadline = time.Minute

func startLibvirt(ctx context.Context, q testvm.QEMU) (*libvirt, error) {
	dir, err := os.MkdirTemp("", "vmsnap-libvirt-")
	if err != nil {
		return nil, err
	}
	l := &libvirt{dir: dir}
	if err := l.start(ctx, q); err != nil {
		return nil, errors.Join(fmt.Errorf("start libvirtd: %w", err), l.end())
	}
	return l, nil
}

func (l *libvirt) start(ctx context.Context, q testvm.QEMU) error {
	if _, err := exec.LookPath("libvirtd"); err != nil {
		return fmt.Errorf("%w: %w", testvm.ErrNoDeps, err)
	}
	conf := filepath.Join(l.dir, "config", "libvirt")
	if err := os.MkdirAll(conf, 0o700); err != nil {
		return err
	}
	// There is no virtlogd that could take what QEMU prints.
	if err := os.WriteFile(filepath.Join(conf, "qemu.conf"), []byte("stdio_handler = \"file\"\n"), 0o600); err != nil {
		return err
	}
	args := []string{"--pid", "--fork", "--mount-proc", "--", "sh", "-c", libvirtScript, "sh", modules(q)}
	cmd := exec.Command("unshare", append(append(args, asNobody...), "libvirtd")...)
	cmd.Env, cmd.Stdout, cmd.Stderr = l.environment(), &l.log, &l.log
	alive, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	l.alive, l.cmd = alive, cmd
	return l.awaitSocket(ctx)
}

// environment has libvirt keep everything below its directory.
func (l *libvirt) environment() []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	for name, sub := range map[string]string{
		"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data",
	} {
		env = append(env, name+"="+filepath.Join(l.dir, sub))
	}
	return env
}

func (l *libvirt) awaitSocket(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, libvirtDeadline)
	defer cancel()
	path := filepath.Join(l.dir, "run", "libvirt", "libvirt-sock")
	conn, err := testvm.Connect(ctx, nil, func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	})
	if err != nil {
		return err
	}
	return conn.Close()
}

// virsh runs a command of virsh.
func (l *libvirt) virsh(ctx context.Context, args ...string) (string, error) {
	line := append(append([]string{}, asNobody...), "virsh", "--connect", "qemu:///session")
	line = append(line, args...)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Env = l.environment()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("virsh %s: %w: %s", args[0], err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// end ends libvirtd with the guests it has, and removes all of it.
func (l *libvirt) end() error {
	var errs []error
	if l.cmd != nil {
		errs = append(errs, l.alive.Close())
		if err := l.cmd.Wait(); err != nil && l.cmd.ProcessState == nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, testvm.RemoveAll(l.dir))...)
}

// create starts a guest that is equal to the one of a command line, and returns
// its process.
func (l *libvirt) create(ctx context.Context, c testvm.Config, args []string) (int, error) {
	emulator, err := l.emulator(c.QEMU)
	if err != nil {
		return 0, err
	}
	text, err := domainXML(emulator, args)
	if err != nil {
		return 0, err
	}
	file := filepath.Join(l.dir, c.Name+".xml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return 0, err
	}
	if _, err := l.virsh(ctx, "create", file); err != nil {
		return 0, err
	}
	return findProcess(c.UUID)
}

// emulator returns a program that libvirt can start a QEMU by: one that is not
// installed needs to be told where its data are.
func (l *libvirt) emulator(q testvm.QEMU) (string, error) {
	if len(q.Args) == 0 {
		return q.Binary, nil
	}
	path := filepath.Join(l.dir, "qemu-"+q.Name)
	script := "#!/bin/sh\nexec " + quote(q.Binary)
	for _, a := range q.Args {
		script += " " + quote(a)
	}
	return path, os.WriteFile(path, []byte(script+" \"$@\"\n"), 0o700)
}

// quote quotes a word for a shell. Paths of ours have no quotes in them.
func quote(s string) string { return "'" + s + "'" }

// findProcess returns the QEMU with a UUID.
func findProcess(id string) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(line, []byte("\x00-uuid\x00"+id+"\x00")) {
			continue // gone, or another's
		}
		return strconv.Atoi(filepath.Base(filepath.Dir(file)))
	}
	return 0, fmt.Errorf("no QEMU has the UUID %s", id)
}

// measureLibvirt has libvirt save a guest.
func (runs *memoryRuns) measureLibvirt(ctx context.Context, l *libvirt, q testvm.QEMU, plan memoryPlan) (err error) {
	c := testvm.Config{
		QEMU: q, Name: fmt.Sprintf("%s-%d-%d", vmName, runs.memoryMiB, runs.rate), UUID: uuid.NewString(),
		Dir:   filepath.Join(l.dir, fmt.Sprintf("%d-%d", runs.memoryMiB, runs.rate)),
		Disks: testvm.TwoDisks(), MemoryMiB: plan.memoryMiB,
	}
	g, err := testvm.Adopt(ctx, c, func(ctx context.Context, args []string) (int, error) { return l.create(ctx, c, args) })
	if err != nil {
		return err
	}
	defer g.Kill()
	if err := plan.use(ctx, g, runs.rate); err != nil {
		return err
	}
	threads, err := namedCPUThreads(g.PID())
	if err != nil {
		return err
	}
	writers, err := g.StartWriters(ctx)
	if err != nil {
		return err
	}
	rounds := 1
	if runs.highest {
		rounds = plan.rival
	}
	w := watcher{g, writers, spender{agent: l.cmd.Process.Pid, qemu: g.PID(), guest: threads}}
	for range rounds {
		one, err := w.watch(ctx, func(ctx context.Context) (save, *span, error) { return l.save(ctx, g) })
		if err != nil {
			return err
		}
		runs.libvirt = append(runs.libvirt, one)
	}
	return nil
}

// save takes a snapshot with memory, and with disks as an overlay has them.
func (l *libvirt) save(ctx context.Context, g *testvm.Guest) (save, *span, error) {
	file := filepath.Join(g.Dir, "memory")
	_, err := l.virsh(ctx, "snapshot-create-as", g.Name, fmt.Sprintf("s%d", time.Now().UnixNano()), "--live", "--memspec", "file="+file+",snapshot=external")
	if err != nil {
		return save{}, nil, err
	}
	fi, err := os.Stat(file)
	if err != nil {
		return save{}, nil, err
	}
	return save{size: fi.Size()}, nil, os.Remove(file)
}
