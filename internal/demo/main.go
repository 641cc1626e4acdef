package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/vmsnap/vmsnap/internal/daemon"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is what the scenes share.
type demo struct {
	*screen
	dir     string // of everything
	began   time.Time
	qemu    testvm.QEMU
	guest   *testvm.Guest   // nil before it has booted
	writers *testvm.Writers // nil while there are none
	daemon  *daemon.Daemon  // nil while it does not run
}

// Where the programs are that `make build` builds, seen from the module's root.
const (
	vmsnapdPath = "bin/vmsnapd"
	vmsnapPath  = "bin/vmsnap"
)

func run(ctx context.Context) (err error) {
	versions, err := testvm.Versions()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "vmsnap-demo-")
	if err != nil {
		return err
	}
	d := &demo{screen: newScreen(os.Stdout), dir: dir, began: time.Now(), qemu: versions[len(versions)-1]}
	defer func() { err = errors.Join(err, d.end()) }()
	for _, scene := range []func(context.Context) error{
		d.boot, d.find, d.snapshot, d.upgrade, d.inspect, d.tell, d.crash, d.restore, d.release,
	} {
		if err := scene(ctx); err != nil {
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return err
		}
	}
	return d.verdict(time.Since(d.began))
}

// end takes away what is left: nothing, if all went well.
func (d *demo) end() error {
	if d.guest != nil {
		d.guest.Kill()
	}
	var errs []error
	if d.daemon != nil {
		errs = append(errs, d.daemon.Stop())
	}
	return errors.Join(append(errs, testvm.RemoveAll(d.dir))...)
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }
