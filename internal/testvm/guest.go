package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Deadlines of this package. They are for guests that will never answer, so
// they are far beyond what a busy machine takes.
const (
	bootDeadline     = 90 * time.Second // 3 s when nothing else runs
	shutdownDeadline = 60 * time.Second // unmounting and the end of QEMU
)

// Guest is a QEMU with a guest that has booted.
type Guest struct {
	Name string
	UUID string
	Dir  string // its images, sockets and logs

	config Config
	args   []string

	mu      sync.Mutex
	process *process
	control *control
}

// Launch makes the images that are missing, starts a guest, and returns when it
// has booted. The caller ends it with Kill, and removes its directory with
// RemoveAll. An error leaves no QEMU behind, nor a directory that Launch chose,
// and tells what the guest's console said last.
func Launch(ctx context.Context, c Config) (*Guest, error) {
	made := ""
	if c.Dir == "" {
		dir, err := os.MkdirTemp("", "vm-") // a short path, for the sockets
		if err != nil {
			return nil, fmt.Errorf("launch guest: %w", err)
		}
		c.Dir, made = dir, dir
	}
	g, err := launch(ctx, c)
	if err != nil {
		err = fmt.Errorf("launch guest: %w", err)
		if made != "" {
			err = errors.Join(err, RemoveAll(made))
		}
		return nil, err
	}
	return g, nil
}

func launch(ctx context.Context, c Config) (*Guest, error) {
	g, err := prepare(ctx, c)
	if err != nil {
		return nil, err
	}
	return g, g.start(ctx)
}

// prepare makes what a guest needs to be started.
func prepare(ctx context.Context, c Config) (*Guest, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	for _, d := range c.Disks {
		if err := makeDisk(ctx, c.QEMU, d); err != nil {
			return nil, fmt.Errorf("disk %s of %s: %w", d.Name, c.Name, err)
		}
	}
	if c.FreezeHook != "" {
		if err := os.WriteFile(filepath.Join(c.Dir, hookName), []byte(c.FreezeHook), 0o600); err != nil {
			return nil, err
		}
	}
	return &Guest{Name: c.Name, UUID: c.UUID, Dir: c.Dir, config: c, args: commandLine(c)}, nil
}

// start starts QEMU and returns when the guest has booted.
func (g *Guest) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	p, err := startProcess(g.args, g.path(qemuLog))
	if err != nil {
		return err
	}
	return g.boot(ctx, p)
}

// boot returns when the guest of a QEMU that was just started has booted. If it
// does not, QEMU is killed.
func (g *Guest) boot(ctx context.Context, p *process) error {
	conn, err := dial(ctx, p, g.path(controlSocket))
	if err != nil {
		p.kill()
		return fmt.Errorf("connect to guest %s: %w%s", g.Name, err, g.logs())
	}
	c := newControl(conn)
	if err := c.awaitBoots(ctx, 1); err != nil {
		p.kill()
		c.close()
		return fmt.Errorf("wait for guest %s to boot: %w%s", g.Name, err, g.logs())
	}
	g.mu.Lock()
	g.process, g.control = p, c
	g.mu.Unlock()
	return nil
}

func (g *Guest) path(name string) string { return filepath.Join(g.Dir, name) }

// QEMU returns the version that the guest runs on.
func (g *Guest) QEMU() QEMU { return g.config.QEMU }

// Disks returns the guest's disks, defaults filled in.
func (g *Guest) Disks() []Disk { return slices.Clone(g.config.Disks) }

// Disk returns the disk of that name. A name that the guest does not have is a
// mistake of the caller, and panics.
func (g *Guest) Disk(name string) Disk {
	for _, d := range g.config.Disks {
		if d.Name == name {
			return d
		}
	}
	panic(fmt.Sprintf("guest %s has no disk %q", g.Name, name))
}

// Args returns the command line that the guest is started by, QEMU's path
// included.
func (g *Guest) Args() []string { return slices.Clone(g.args) }

// QMPSocket returns the path of the QMP socket given with -qmp.
func (g *Guest) QMPSocket() string { return g.path(qmpSocket) }

// ExtraQMPSockets returns the paths of the additional QMP sockets.
func (g *Guest) ExtraQMPSockets() []string {
	var paths []string
	for i := range g.config.ExtraQMP {
		paths = append(paths, g.path(extraQMPSocket(i)))
	}
	return paths
}

// AgentSocket returns the path of the guest agent's socket.
func (g *Guest) AgentSocket() string { return g.path(agentSocket) }

// PID returns the process id of the QEMU that was started last.
func (g *Guest) PID() int {
	p, _ := g.current()
	return p.pid
}

// Running tells whether the QEMU that was started last still runs.
func (g *Guest) Running() bool {
	p, _ := g.current()
	return p.running()
}

func (g *Guest) current() (*process, *control) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.process, g.control
}

// Kill ends QEMU with SIGKILL, as a power cut does for the guest. It returns
// when the process is gone.
func (g *Guest) Kill() {
	p, c := g.current()
	p.kill()
	c.close()
}

// Restart kills QEMU if it still runs, starts it by the unchanged command line
// and returns when the guest has booted.
func (g *Guest) Restart(ctx context.Context) error {
	g.Kill()
	if err := g.start(ctx); err != nil {
		return fmt.Errorf("restart guest %s: %w", g.Name, err)
	}
	return nil
}

// Wait returns when QEMU has ended by itself.
func (g *Guest) Wait(ctx context.Context) error {
	p, c := g.current()
	if err := p.wait(ctx); err != nil {
		return fmt.Errorf("wait for the end of guest %s: %w", g.Name, err)
	}
	c.close()
	return nil
}

// AwaitBoot returns when the guest has booted n times since QEMU was started,
// counting the first. It is for guests that reboot.
func (g *Guest) AwaitBoot(ctx context.Context, n int) error {
	_, c := g.current()
	if err := c.awaitBoots(ctx, n); err != nil {
		return fmt.Errorf("wait for boot %d of guest %s: %w%s", n, g.Name, err, g.logs())
	}
	return nil
}

// logTail is how much of each log an error shows, in bytes.
const logTail = 2000

// logs returns the end of what QEMU and the guest's console said.
func (g *Guest) logs() string {
	var text string
	for _, name := range []string{qemuLog, consoleLog} {
		b, err := os.ReadFile(g.path(name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			text += fmt.Sprintf("\n%s: %v", name, err)
			continue
		}
		if len(b) > 0 {
			text += fmt.Sprintf("\n%s ends:\n%s", name, b[max(0, len(b)-logTail):])
		}
	}
	return text
}
