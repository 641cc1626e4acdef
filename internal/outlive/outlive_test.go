package outlive

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/google/go-cmp/cmp"
)

// A log that nobody reads holds nothing up.
func TestLogNeverWaits(t *testing.T) {
	r, w := io.Pipe()
	p := NewPatientWriter(w)
	for range 1000 {
		if n, err := p.Write([]byte("line\n")); n != 5 || err != nil {
			t.Fatalf("wrote %d, error %v", n, err)
		}
	}
	p.Flush(time.Millisecond)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestLogIsFlushed(t *testing.T) {
	r, w := io.Pipe()
	p := NewPatientWriter(w)
	read := make(chan string, 1)
	go func() {
		b := make([]byte, 4)
		_, _ = io.ReadFull(r, b)
		read <- string(b)
	}()
	_, _ = p.Write([]byte("last"))
	p.Flush(time.Minute)
	if got := <-read; got != "last" {
		t.Errorf("read %q", got)
	}
}

// manager is systemd, as far as starting a unit goes.
type manager struct {
	result     string
	err        error
	name, mode string
	properties []dbus.Property
}

func (m *manager) StartTransientUnitContext(_ context.Context, name, mode string, properties []dbus.Property, done chan<- string) (int, error) {
	m.name, m.mode, m.properties = name, mode, properties
	if m.result != "" {
		done <- m.result
	}
	return 1, m.err
}

func TestScope(t *testing.T) {
	const want = "vmsnap-guard-0123.scope"
	tests := []struct {
		name    string
		manager manager
		ok      bool
	}{
		{"started", manager{result: "done"}, true},
		{"failed", manager{result: "failed"}, false},
		{"refused", manager{err: errors.New("denied")}, false},
		{"silent", manager{}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			name, err := startScope(ctx, &test.manager, want, "a guard", 4711)
			if (err == nil) != test.ok || test.ok && name != want {
				t.Errorf("scope %q, error %v", name, err)
			}
			pids := false
			for _, p := range test.manager.properties {
				pids = pids || p.Name == "PIDs" && cmp.Equal(p.Value.Value(), []uint32{4711})
			}
			if test.manager.name != want || test.manager.mode != "fail" || !pids {
				t.Errorf("asked for %+v", test.manager)
			}
		})
	}
}
