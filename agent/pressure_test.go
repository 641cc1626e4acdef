package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/op"
)

// TestUpkeepYieldsToTheGuest has the guest's control group tell how it waits for its
// disks: an upkeep rests from a fifth of the time on until it is less than a tenth,
// and does not when nobody tells.
func TestUpkeepYieldsToTheGuest(t *testing.T) {
	t.Parallel()
	a := shelf(t, "web")
	v, group := a.vms["web"], t.TempDir()
	r := newRun(discover.Process{PID: os.Getpid()})
	// The path is one below /sys/fs/cgroup.
	r.proc.Cgroup = discover.Cgroup{Mode: discover.CgroupV2, Unit: "web.service", Path: filepath.Join("../../..", group)}
	v.runs = []*run{r}
	rec, err := a.ops.Start(t.Context(), op.Spec{Kind: op.KindUpkeep, VMID: v.id, VMName: "web", Request: struct{}{}}, func(ctx context.Context, o *op.Op) error {
		o.Pausable()
		end := (&deletion{Agent: a, o: o, vm: v}).yield(ctx)
		for _, c := range []struct {
			waits string // empty: the kernel does not tell
			rests bool
		}{{"19.90", false}, {"20.10", true}, {"10.10", true}, {"9.90", false}, {"99.00", true}, {"", false}} {
			if err := pressure(group, c.waits); err != nil {
				return err
			}
			if err := settles(o, c.rests); err != nil {
				return fmt.Errorf("waiting %q hundredths of the time: %w", c.waits, err)
			}
		}
		end()
		if rests, _ := o.Rests(); rests {
			t.Error("it rests when nothing is left that could end that")
		}
		return nil
	})
	if err == nil {
		rec, err = a.ops.Wait(t.Context(), rec.ID)
	}
	if err == nil {
		err = failureOf(rec)
	}
	if err != nil {
		t.Error(err)
	}
}

// pressure has a control group tell for how much of the time somebody waits.
func pressure(group, waits string) error {
	file := filepath.Join(group, "io.pressure")
	if waits == "" {
		return os.Remove(file)
	}
	text := fmt.Sprintf("some avg10=%s avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n", waits)
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// settles waits until an operation rests or works on as it should. One that is to
// stay as it is has time for another look.
func settles(o *op.Op, want bool) error {
	before, _ := o.Rests()
	limit := 10 * time.Second
	if before == want {
		limit = 1500 * time.Millisecond // it looks each second
	}
	deadline := time.After(limit)
	for {
		rests, changed := o.Rests()
		if rests == want && before != want {
			return nil
		}
		select {
		case <-changed:
		case <-deadline:
			if rests != want {
				return fmt.Errorf("it rests: %v; want %v", rests, want)
			}
			return nil
		}
	}
}

func TestParsePressure(t *testing.T) {
	for text, want := range map[string]float64{
		"some avg10=23.50 avg60=1.00 avg300=0.00 total=12345\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n": 23.5,
		"some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n":                                                      0,
		"":                 -1,
		"full avg10=3.00 ": -1,
		"some avg10=x ":    -1,
	} {
		got, err := parsePressure(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}
