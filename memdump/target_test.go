package memdump

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

func TestUnsafeTargets(t *testing.T) {
	q72, q100 := newScript(t, monitortest.QEMU72), newScript(t, monitortest.QEMU100)
	open := func(flags int, reserve int64) *os.File {
		t.Helper()
		f := q72.target(reserve)
		f, err := os.OpenFile(f.Name(), flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(r.Close(), w.Close()) }()
	reserve := int64(Facts{RAM: 1 << 20}.Reserve())
	closed := q72.target(0)
	_ = closed.Close()
	for name, c := range map[string]struct {
		target     *os.File
		on72, on10 bool // it is taken
	}{
		"reserved":  {open(os.O_WRONLY, reserve), true, true},
		"too small": {open(os.O_WRONLY, reserve-1<<20), false, true},
		"sparse":    {open(os.O_WRONLY, 0), false, true},
		"read-only": {open(os.O_RDONLY, reserve), false, false},
		"append":    {open(os.O_WRONLY|os.O_APPEND, reserve), false, false},
		"direct":    {open(os.O_WRONLY|unix.O_DIRECT, reserve), false, false},
		"pipe":      {w, false, false},
		"closed":    {closed, false, false},
	} {
		for q, want := range map[*script]bool{q72: c.on72, q100: c.on10} {
			config := q.config(Background, nil)
			config.Target, config.PID = c.target, os.Getpid()
			_, err := Prepare(q.ctx(), config)
			if (err == nil) != want || err != nil && !errors.Is(err, ErrUnsafeTarget) {
				t.Errorf("%s, QEMU %s: %v", name, versionOf(q.session), err)
			}
		}
	}
	// Space that the offset takes is not there for the stream.
	config := q72.config(Background, nil)
	if _, err := config.Target.Seek(1<<20, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(q72.ctx(), config); !errors.Is(err, ErrUnsafeTarget) {
		t.Error(err)
	}
}
