package memdump

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// Settings are the migration settings of a VM's owner that a save changes, as
// they were before, and what else a save may leave in QEMU. They are made for a
// journal. They hold what was changed only, so that an owner's later change of
// something else survives.
type Settings struct {
	Capabilities map[string]bool            `json:"capabilities,omitempty"`
	Parameters   map[string]json.RawMessage `json:"parameters,omitempty"`
	FD           string                     `json:"fd"`      // name of the descriptor in QEMU
	Running      bool                       `json:"running"` // the guest's CPUs ran
}

// Names of capabilities and parameters (qapi/migration.json).
const (
	capEvents        = "events"
	capPauseAtSwitch = "pause-before-switchover"

	parMaxBandwidth = "max-bandwidth"  // bytes per second; 0 is no limit
	parDowntime     = "downtime-limit" // milliseconds
	parTLS          = "tls-creds"      // "" is none
	parMode         = "mode"           // from 8.2 on
	parZeroPages    = "zero-page-detection"
	parSwitchover   = "avail-switchover-bandwidth"
)

// capabilitiesFor are those that a save by this strategy needs. All others are
// switched off: they would change the stream, or QEMU refuses them together.
func capabilitiesFor(strategy Strategy, tracked bool) map[string]bool {
	on := map[string]bool{capEvents: true}
	if strategy == Precopy {
		on[capPauseAtSwitch] = true
	}
	if tracked {
		on[capBackground] = true
	}
	return on
}

// parametersFor are the values that a save by this strategy needs.
func parametersFor(strategy Strategy) map[string]any {
	want := map[string]any{
		parTLS:       "",       // a file does not do the handshake
		parMode:      "normal", // not for a restart of QEMU on this host
		parZeroPages: "legacy", // "none" would write zeros as they are
	}
	if strategy != Background { // which knows no limit
		want[parMaxBandwidth] = 0
		want[parSwitchover] = 0 // measured, not assumed
	}
	if strategy == Precopy {
		want[parDowntime] = firstDowntime.Milliseconds()
	}
	return want
}

func queryCapabilities(ctx context.Context, s *monitor.Session) (map[string]bool, error) {
	var list []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := s.Execute(ctx, "query-migrate-capabilities", nil, &list); err != nil {
		return nil, err
	}
	caps := make(map[string]bool, len(list))
	for _, c := range list {
		caps[c.Capability] = c.State
	}
	return caps, nil
}

func setCapabilities(ctx context.Context, s *monitor.Session, caps map[string]bool) error {
	if len(caps) == 0 {
		return nil
	}
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	var list []capability
	for name, state := range caps {
		list = append(list, capability{name, state})
	}
	return s.Execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// changes are the settings to make for a save, beside those found.
type changes struct {
	capabilities map[string]bool
	parameters   map[string]any
}

// plan compares what a save needs with what is set. It returns what to change
// and how that was.
func plan(ctx context.Context, s *monitor.Session, strategy Strategy, tracked bool) (changes, Settings, error) {
	found, err := queryCapabilities(ctx, s)
	if err != nil {
		return changes{}, Settings{}, err
	}
	var parameters map[string]json.RawMessage
	if err := s.Execute(ctx, "query-migrate-parameters", nil, &parameters); err != nil {
		return changes{}, Settings{}, err
	}
	todo := changes{map[string]bool{}, map[string]any{}}
	old := Settings{Capabilities: map[string]bool{}, Parameters: map[string]json.RawMessage{}}
	want := capabilitiesFor(strategy, tracked)
	for name := range want {
		if _, ok := found[name]; !ok {
			return changes{}, Settings{}, &UnsuitableError{Strategy: strategy, Reason: "this QEMU has no capability " + name}
		}
	}
	for name, state := range found {
		if state != want[name] {
			todo.capabilities[name], old.Capabilities[name] = want[name], state
		}
	}
	for name, value := range parametersFor(strategy) {
		wanted, err := json.Marshal(value)
		if err != nil {
			return changes{}, Settings{}, err
		}
		now, ok := parameters[name]
		switch {
		case !ok || bytes.Equal(now, wanted): // a version without it does not need it
		case name == parZeroPages && string(now) != `"none"`: // all others find them
		default:
			todo.parameters[name], old.Parameters[name] = value, now
		}
	}
	return todo, old, nil
}

// apply makes the changes. When QEMU refuses, some may have been made.
func (c changes) apply(ctx context.Context, s *monitor.Session) error {
	if err := setCapabilities(ctx, s, c.capabilities); err != nil {
		return err
	}
	if len(c.parameters) == 0 {
		return nil
	}
	return s.Execute(ctx, "migrate-set-parameters", c.parameters, nil)
}

// Restore puts the settings back, and takes the descriptor from QEMU if it has
// not been used. It may be called again, by whoever has the settings. While a
// migration is under way QEMU keeps its settings, and the error is ErrBusy.
func (s Settings) Restore(ctx context.Context, m *monitor.Session) error {
	if err := s.restore(ctx, m); err != nil {
		return fmt.Errorf("put the migration settings back: %w", err)
	}
	return nil
}

func (s Settings) restore(ctx context.Context, m *monitor.Session) error {
	now, err := m.QueryMigrate(ctx)
	if err != nil {
		return err
	}
	if underWay(now.Status) {
		return fmt.Errorf("%w (%s)", ErrBusy, now.Status)
	}
	errs := []error{setCapabilities(ctx, m, s.Capabilities)}
	if len(s.Parameters) > 0 {
		errs = append(errs, m.Execute(ctx, "migrate-set-parameters", s.Parameters, nil))
	}
	return errors.Join(append(errs, s.closeFD(ctx, m))...)
}

// closeFD closes the descriptor in QEMU, if it has one of that name: migrate
// takes it, and so does the end of a monitor that is not there any more.
func (s Settings) closeFD(ctx context.Context, m *monitor.Session) error {
	if s.FD == "" {
		return nil
	}
	err := m.Execute(ctx, "closefd", map[string]string{"fdname": s.FD}, nil)
	var refused *monitor.CommandError
	if errors.As(err, &refused) {
		return nil
	}
	return err
}

// setDowntime tells QEMU how long the last pass may take.
func setDowntime(ctx context.Context, s *monitor.Session, limit time.Duration) error {
	args := map[string]int64{parDowntime: max(limit.Milliseconds(), 1)}
	return s.Execute(ctx, "migrate-set-parameters", args, nil)
}
