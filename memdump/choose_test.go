package memdump

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/monitor"
)

var (
	v72  = Version{7, 2, 22}
	v80  = Version{8, 0, 5}
	v81  = Version{8, 1, 0}
	v90  = Version{9, 0, 1}
	v100 = Version{10, 0, 2}
)

func TestVersionAtLeast(t *testing.T) {
	for _, c := range []struct {
		v            Version
		major, minor int
		want         bool
	}{
		{v72, 8, 1, false}, {v80, 8, 1, false}, {v81, 8, 1, true}, {v90, 8, 1, true}, {v100, 9, 2, true},
	} {
		if got := c.v.AtLeast(c.major, c.minor); got != c.want {
			t.Errorf("%s is at least %d.%d: %v", c.v, c.major, c.minor, got)
		}
	}
	if mayHang(v81) || !mayHang(v80) || !mayHang(v72) {
		t.Error("8.1 is the first that can be cancelled")
	}
}

func TestChoose(t *testing.T) {
	running := Facts{Version: v72, Status: monitor.RunStateRunning, Running: true}
	untracked := running
	untracked.Tracking = "no"
	emulated, untrackedEmulated := running, untracked
	emulated.Inexact, untrackedEmulated.Inexact = "lossy", "lossy"
	paused := Facts{Version: v72, Status: monitor.RunStatePaused}
	paused10 := Facts{Version: v100, Status: monitor.RunStatePaused}
	untracked10 := paused10
	untracked10.Tracking = "no"
	for name, c := range map[string]struct {
		facts Facts
		want  Strategy
		got   Strategy // "" for an error
		warn  []string
		err   string // in the error
	}{
		"running":              {facts: running, got: Background},
		"cannot track":         {facts: untracked, got: Precopy, warn: []string{WarnTracking}},
		"background wanted":    {facts: running, want: Background, got: Background},
		"emulated":             {facts: emulated, got: Background},
		"emulated, untracked":  {facts: untrackedEmulated, got: Stopped, warn: []string{WarnTracking}},
		"emulated, precopy":    {facts: emulated, want: Precopy, err: "precopy cannot be used: lossy"},
		"precopy wanted":       {facts: untracked, want: Precopy, got: Precopy},
		"stopped wanted":       {facts: running, want: Stopped, got: Stopped},
		"background, and not":  {facts: untracked, want: Background, err: "background cannot be used: no"},
		"unknown":              {facts: running, want: "best", err: "no such strategy"},
		"paused":               {facts: paused, got: Stopped, warn: []string{WarnPostmigrate}},
		"paused, 10":           {facts: paused10, got: Stopped},
		"paused, 10, no track": {facts: untracked10, got: Stopped, warn: []string{WarnPostmigrate}},
		"never ran, 10":        {facts: Facts{Version: v100, Status: monitor.RunStatePrelaunch}, got: Stopped, warn: []string{WarnPostmigrate}},
		"paused, background":   {facts: paused10, want: Background, err: "not running (paused)"},
		"paused, stopped":      {facts: paused10, want: Stopped, got: Stopped},
		"blocked":              {facts: Facts{Status: monitor.RunStateRunning, Running: true, Blocked: []string{"VFIO", "9p"}}, err: "VFIO; 9p"},
		"postmigrate":          {facts: Facts{Status: monitor.RunStatePostMigrate}, err: "resume it first"},
		"incoming":             {facts: Facts{Status: monitor.RunStateInMigrate}, err: "inmigrate"},
		"sleeping":             {facts: Facts{Status: monitor.RunStateSuspended}, err: "wake it"},
		"shut down":            {facts: Facts{Status: monitor.RunStateShutdown}, err: "shutdown"},
		"I/O error":            {facts: Facts{Status: monitor.RunStateIOError}, err: "io-error"},
	} {
		choice, err := Choose(c.facts, c.want)
		var unsuitable *UnsuitableError
		if c.got == "" && (!errors.As(err, &unsuitable) || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %+v, %v", name, choice, err)
		}
		if c.got != "" && (err != nil || choice.Strategy != c.got || choice.Reason == "") {
			t.Errorf("%s: %+v, %v", name, choice, err)
		}
		var codes []string
		for _, w := range choice.Warnings {
			codes = append(codes, w.Code)
		}
		if !slices.Equal(codes, c.warn) {
			t.Errorf("%s: warnings %v", name, choice.Warnings)
		}
	}
	busy := running
	busy.Busy = "active"
	if _, err := Choose(busy, ""); !errors.Is(err, ErrBusy) {
		t.Errorf("busy: %v", err)
	}
}
