package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// Running reports whether systemd is this host's init (sd_booted(3)).
func Running() bool {
	info, err := os.Lstat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// ErrDenied means that systemd does not let this process do that. For users other than
// root polkit has to allow it.
var ErrDenied = errors.New("systemd does not allow it")

// A JobError is a unit that did not start or stop as it was told.
type JobError struct {
	Unit   string
	Result string // of the job: failed, timeout, canceled, dependency, skipped
}

// Error names the unit and the result.
func (e *JobError) Error() string {
	return fmt.Sprintf("systemd could not start or stop unit %s: %s", e.Unit, e.Result)
}

// Units starts and stops units over D-Bus (org.freedesktop.systemd1(5)).
type Units struct{ conn *dbus.Conn }

// ConnectUnits connects to systemd.
func ConnectUnits(ctx context.Context) (*Units, error) {
	// The library closes the connection with its context.
	conn, err := dbus.NewWithContext(context.WithoutCancel(ctx))
	if err != nil {
		return nil, fmt.Errorf("systemd's D-Bus: %w", err)
	}
	return &Units{conn}, nil
}

// Close ends the connection. Units stay as they are.
func (u *Units) Close() { u.conn.Close() }

// Service is what systemd tells of a service.
type Service struct {
	Loaded    bool // it has a unit file, or was made by StartTransient
	Transient bool // it has no file, and is gone when it has stopped
	Active    string
	MainPID   int // 0 while it has none
	Type      string
	Result    string // why it failed; "success"
	Program   string // of its ExecStart=; "" when there is none or several
}

// Service describes a service. One that is not known is not loaded.
func (u *Units) Service(ctx context.Context, unit string) (Service, error) {
	p, err := u.conn.GetAllPropertiesContext(ctx, unit)
	if err != nil {
		return Service{}, refused("look at unit "+unit, err)
	}
	s := Service{}
	load, _ := p["LoadState"].(string)
	s.Loaded = load == "loaded"
	s.Transient, _ = p["Transient"].(bool)
	s.Active, _ = p["ActiveState"].(string)
	pid, _ := p["MainPID"].(uint32)
	s.MainPID = int(pid)
	s.Type, _ = p["Type"].(string)
	s.Result, _ = p["Result"].(string)
	if commands, _ := p["ExecStart"].([][]any); len(commands) == 1 && len(commands[0]) > 0 {
		s.Program, _ = commands[0][0].(string)
	}
	return s, nil
}

// Start starts a unit and returns when it is active.
func (u *Units) Start(ctx context.Context, unit string) error {
	_ = u.conn.ResetFailedUnitContext(ctx, unit) // of a start limit; one that has not failed refuses
	return await(ctx, unit, func(done chan<- string) (int, error) { return u.conn.StartUnitContext(ctx, unit, "replace", done) })
}

// Stop stops a unit and returns when it has stopped. From the moment that begun
// is called, which may be nil, systemd does not restart it. One that is not known
// has stopped.
func (u *Units) Stop(ctx context.Context, unit string, begun func() error) error {
	var also error
	err := await(ctx, unit, func(done chan<- string) (int, error) {
		n, err := u.conn.StopUnitContext(ctx, unit, "replace", done)
		if err == nil && begun != nil {
			also = begun()
		}
		return n, err
	})
	var gone godbus.Error
	if errors.As(err, &gone) && gone.Name == "org.freedesktop.systemd1.NoSuchUnit" {
		err = nil
		if begun != nil {
			also = begun()
		}
	}
	return errors.Join(also, err)
}

// TransientService is a service that has no file.
type TransientService struct {
	Name        string // NAME.service
	Description string
	Command     []string // the first is an absolute path
	Forks       bool     // the command ends when the service is up (Type=forking)
	PIDFile     string   // of one that forks; may be empty
	Slice       string   // empty: system.slice
	Directory   string   // empty: /
	User, Group string   // numeric; empty: root
	Groups      []string // supplementary, numeric
}

// StartTransient starts a service without a file and returns when its command
// runs, or with Forks has ended well.
func (u *Units) StartTransient(ctx context.Context, s TransientService) error {
	kind := "exec"
	if s.Forks {
		kind = "forking"
	}
	props := []dbus.Property{
		dbus.PropDescription(s.Description), dbus.PropType(kind), dbus.PropExecStart(s.Command, false),
		property("KillMode", "mixed"), property("CollectMode", "inactive-or-failed"),
	}
	for name, value := range map[string]string{
		"Slice": s.Slice, "WorkingDirectory": s.Directory, "User": s.User, "Group": s.Group, "PIDFile": s.PIDFile,
	} {
		if value != "" {
			props = append(props, property(name, value))
		}
	}
	if len(s.Groups) > 0 {
		props = append(props, property("SupplementaryGroups", s.Groups))
	}
	return await(ctx, s.Name, func(done chan<- string) (int, error) {
		return u.conn.StartTransientUnitContext(ctx, s.Name, "fail", props, done)
	})
}

// Scope moves a process that runs already into a scope of its own.
func (u *Units) Scope(ctx context.Context, name, description, slice string, pid int) error {
	props := []dbus.Property{
		dbus.PropDescription(description), dbus.PropPids(uint32(pid)), property("CollectMode", "inactive-or-failed"),
	}
	if slice != "" {
		props = append(props, dbus.PropSlice(slice))
	}
	return await(ctx, name, func(done chan<- string) (int, error) {
		return u.conn.StartTransientUnitContext(ctx, name, "fail", props, done)
	})
}

func property(name string, value any) dbus.Property {
	return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
}

// await runs a job and waits for its end.
func await(ctx context.Context, unit string, start func(done chan<- string) (int, error)) error {
	done := make(chan string, 1)
	if _, err := start(done); err != nil {
		return refused("unit "+unit, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return &JobError{unit, result}
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("unit %s: %w", unit, context.Cause(ctx))
	}
}

// refused tells a lack of rights from other errors.
func refused(what string, err error) error {
	var e godbus.Error
	if errors.As(err, &e) {
		switch e.Name {
		case "org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired":
			return fmt.Errorf("%s: %w: %w", what, ErrDenied, err)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// runtimeUnits is where units of this boot are changed (systemd.unit(5)).
const runtimeUnits = "/run/systemd/system"

// Override changes a unit until the host goes down or Restored is called, by a
// drop-in NAME.conf.
func (u *Units) Override(ctx context.Context, unit, name, text string) error {
	dir, err := dropInDir(unit)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("drop-in of unit %s: %w", unit, err)
	}
	path := filepath.Join(dir, name+".conf")
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return fmt.Errorf("drop-in of unit %s: %w", unit, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("drop-in of unit %s: %w", unit, err)
	}
	return u.reload(ctx)
}

// Restore takes an Override back. It does not mind if there is none.
func (u *Units) Restore(ctx context.Context, unit, name string) error {
	dir, err := dropInDir(unit)
	if err != nil {
		return err
	}
	for _, path := range []string{filepath.Join(dir, name+".conf"), filepath.Join(dir, name+".conf.new")} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("drop-in of unit %s: %w", unit, err)
		}
	}
	_ = os.Remove(dir) // unless somebody else has something in it
	return u.reload(ctx)
}

func (u *Units) reload(ctx context.Context) error {
	if err := u.conn.ReloadContext(ctx); err != nil {
		return refused("systemd's daemon-reload", err)
	}
	return nil
}

func dropInDir(unit string) (string, error) {
	if unit != filepath.Base(unit) || !strings.Contains(unit, ".") || strings.HasPrefix(unit, ".") {
		return "", fmt.Errorf("%q is not the name of a unit", unit)
	}
	return filepath.Join(runtimeUnits, unit+".d"), nil
}

// QuoteCommand writes a command line so that ExecStart= means exactly these
// arguments (systemd.service(5), "Command lines").
func QuoteCommand(args []string) string {
	var b strings.Builder
	for i, arg := range args {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteByte('"')
		for _, c := range []byte(arg) {
			switch {
			case c == '"' || c == '\\':
				b.WriteByte('\\')
				b.WriteByte(c)
			case c == '%' || c == '$' && i > 0: // specifiers and variables; no variable is the path's
				b.WriteByte(c)
				b.WriteByte(c)
			case c < ' ' || c == 0x7f:
				fmt.Fprintf(&b, `\x%02x`, c)
			default:
				b.WriteByte(c)
			}
		}
		b.WriteByte('"')
	}
	return b.String()
}
