package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/hook"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/rpc"
)

// config is the daemon's settings. Each has a flag of the same name, which
// goes before the file, and a default that works.
type config struct {
	StateDir      string
	RunDir        string
	Socket        string
	SocketGroup   string
	MetricsListen string
	MetricsConfig string
	VMsDir        string
	OverlayDir    string
	MemoryDir     string
	MemoryKey     string
	Launcher      string
	KeepPages     bool
	LogLevel      string
	LogFormat     string
	ScanOnly      bool
	ListedOnly    bool
	Viewers       []string
	Operators     []string
	Admins        []string
	EventKeep     int
	EventMaxAge   time.Duration
	EventJournal  bool
	WebhookURL    string
	WebhookSecret string

	HooksDir        string
	HookTimeout     time.Duration
	HookTimeouts    map[string]string
	HooksFailClosed []string

	Profiles profiles

	MaxOperations           int
	MaxOperationsPerStorage int

	MergeSpeed     int // MiB a second
	UpkeepSpeed    int // the same
	UpkeepInterval time.Duration
	MaxChain       int

	LowSpace     int // MiB
	ResumeGuests bool

	ScheduleMaxKeep int
	ScheduleMaxAge  time.Duration

	places map[string]string // FILE:LINE of the settings that a file gave
}

// settings are what a file can set, by name.
func (c *config) settings() map[string]any {
	return map[string]any{
		"state-dir": &c.StateDir, "run-dir": &c.RunDir, "socket": &c.Socket, "socket-group": &c.SocketGroup,
		"metrics-listen": &c.MetricsListen, "metrics-config": &c.MetricsConfig, "vms-dir": &c.VMsDir, "overlay-dir": &c.OverlayDir,
		"memory-dir": &c.MemoryDir, "memory-key": &c.MemoryKey, "launcher": &c.Launcher, "leave-pages-split": &c.KeepPages,
		"log-level": &c.LogLevel, "log-format": &c.LogFormat, "scan-only": &c.ScanOnly, "listed-only": &c.ListedOnly,
		"event-keep": &c.EventKeep, "event-max-age": &c.EventMaxAge, "event-journal": &c.EventJournal,
		"webhook-url": &c.WebhookURL, "webhook-secret": &c.WebhookSecret,
		"hooks-dir": &c.HooksDir, "hook-timeout": &c.HookTimeout, "hook-timeouts": &c.HookTimeouts, "hooks-fail-closed": &c.HooksFailClosed,
		"profiles":       &c.Profiles,
		"max-operations": &c.MaxOperations, "max-operations-per-storage": &c.MaxOperationsPerStorage,
		"merge-speed": &c.MergeSpeed, "max-chain": &c.MaxChain,
		"upkeep-speed": &c.UpkeepSpeed, "upkeep-interval": &c.UpkeepInterval,
		"low-space": &c.LowSpace, "resume-guests": &c.ResumeGuests,
		"schedule-max-keep": &c.ScheduleMaxKeep, "schedule-max-age": &c.ScheduleMaxAge,
		"viewers": &c.Viewers, "operators": &c.Operators, "admins": &c.Admins,
	}
}

const defaultConfigFile = "/etc/vmsnap/vmsnapd.yaml"

func (c *config) flags(f *pflag.FlagSet) {
	f.StringVar(&c.StateDir, "state-dir", "/var/lib/vmsnap", "`directory` of the catalog and of freeze leases")
	f.StringVar(&c.RunDir, "run-dir", "/run/vmsnap", "`directory` of the API socket")
	f.StringVar(&c.Socket, "socket", "", "`path` of the API socket (default: vmsnapd.sock in the run directory)")
	f.StringVar(&c.SocketGroup, "socket-group", "", "`group` that may connect to the API socket; what it may do there is up to the roles")
	f.StringVar(&c.MetricsListen, "metrics-listen", "127.0.0.1:9777", "`address` to serve /metrics on; empty serves none")
	f.StringVar(&c.MetricsConfig, "metrics-config", "", "`file` with TLS and basic auth for /metrics (Prometheus exporter-toolkit)")
	f.StringVar(&c.VMsDir, "vms-dir", "/etc/vmsnap/vms.d", "`directory` of YAML files that name VMs or override what is found")
	f.StringVar(&c.OverlayDir, "overlay-dir", "", "`directory` in which the overlays of snapshots are made (default: beside the layer that is covered)")
	f.StringVar(&c.Launcher, "launcher", "auto", "who starts QEMU when memory is restored: auto, unit, systemd, exec or external")
	f.StringVar(&c.MemoryDir, "memory-dir", "", "`directory` in which memory is saved (default: .vmsnap beside the first disk's layers)")
	f.StringVar(&c.MemoryKey, "memory-key", "", "`key` that memory is encrypted with: the name of a credential of the unit, or the path of a file (default: it is not)")
	f.BoolVar(&c.KeepPages, "leave-pages-split", false, "do not put a guest's huge pages back after its memory was saved")
	f.StringVar(&c.LogLevel, "log-level", "info", "`level`: debug, info, warn or error")
	f.StringVar(&c.LogFormat, "log-format", "text", "`format`: text or json")
	f.BoolVar(&c.ScanOnly, "scan-only", false, "find VMs by scanning /proc only, without process events")
	f.BoolVar(&c.ListedOnly, "listed-only", false, "manage only the VMs that a file in --vms-dir names")
	f.IntVar(&c.EventKeep, "event-keep", agent.DefaultEventKeep, "how many events are kept")
	f.DurationVar(&c.EventMaxAge, "event-max-age", agent.DefaultEventMaxAge, "how long events are kept")
	f.BoolVar(&c.EventJournal, "event-journal", false, "write events to systemd's journal")
	f.StringVar(&c.WebhookURL, "webhook-url", "", "`URL` that events are posted to as JSON")
	f.StringVar(&c.WebhookSecret, "webhook-secret", "", "`file` with the secret with which posted events are signed")
	f.IntVar(&c.ScheduleMaxKeep, "schedule-max-keep", 0, "how many snapshots of a VM a schedule may keep (default: any number)")
	f.DurationVar(&c.ScheduleMaxAge, "schedule-max-age", 0, "how old the snapshots of a schedule may get (default: any age)")
	f.StringVar(&c.HooksDir, "hooks-dir", "/etc/vmsnap/hooks.d", "`directory` of the programs that are run around operations; empty: none are")
	f.DurationVar(&c.HookTimeout, "hook-timeout", hook.DefaultTimeout, "how long a hook may take")
	f.StringToStringVar(&c.HookTimeouts, "hook-timeouts", nil, "how long the hooks of some `phases` may take, such as post-snapshot=1h")
	f.StringSliceVar(&c.HooksFailClosed, "hooks-fail-closed", []string{string(hook.PreFreeze), string(hook.PreRestore)}, "`phases` of which a hook that fails counts")
	f.IntVar(&c.MaxOperations, "max-operations", 0, "how many operations run at the same time (default: any number)")
	f.IntVar(&c.MaxOperationsPerStorage, "max-operations-per-storage", 0, "how many of them on the same file system or device (default: any number)")
	f.IntVar(&c.MergeSpeed, "merge-speed", 0, "`MiB` a second that deleting a snapshot copies at most, unless its request says otherwise (default: any number)")
	f.IntVar(&c.UpkeepSpeed, "upkeep-speed", 32, "`MiB` a second that merging layers which were left over copies at most; 0: they stay")
	f.DurationVar(&c.UpkeepInterval, "upkeep-interval", 10*time.Minute, "how often it is looked for such layers; 0: never")
	f.IntVar(&c.MaxChain, "max-chain", agent.DefaultMaxChain, "how many layers of a disk may lie on each other; 0: any number")
	f.IntVar(&c.LowSpace, "low-space", 1024, "`MiB` that are to be free where a disk grows, or an event and a metric say so; 0: they never do")
	f.BoolVar(&c.ResumeGuests, "resume-guests", false, "let guests run again that QEMU has stopped for want of space, once there is space")
	f.StringSliceVar(&c.Viewers, "viewers", nil, "`groups` that may look; GROUP:PATTERN for VMs with such names only")
	f.StringSliceVar(&c.Operators, "operators", nil, "`groups` that may also take snapshots, freeze and thaw; GROUP:PATTERN for some VMs")
	f.StringSliceVar(&c.Admins, "admins", nil, "`groups` that may do everything; GROUP:PATTERN everything to some VMs")
}

// load reads the file, whose settings give way to the flags that were given.
// The default file may be absent; one that was named must exist. A mistake is
// told with its file and line.
func (c *config) load(path string, named bool, f *pflag.FlagSet) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return c.check()
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var document yaml.Node
	if err := yaml.Unmarshal(data, &document); err != nil {
		return fmt.Errorf("configuration: %s: %w", path, err)
	}
	c.places = map[string]string{}
	if len(document.Content) > 0 && document.Content[0].Tag != "!!null" {
		if err := c.read(path, document.Content[0], f); err != nil {
			return err
		}
	}
	return c.check()
}

// read takes the settings in, and tells all its mistakes together.
func (c *config) read(path string, settings *yaml.Node, f *pflag.FlagSet) error {
	if settings.Kind != yaml.MappingNode {
		return fmt.Errorf("configuration: %s:%d: must be settings with values", path, settings.Line)
	}
	var errs []error
	seen := map[string]bool{}
	for i := 0; i+1 < len(settings.Content); i += 2 {
		key, value := settings.Content[i], settings.Content[i+1]
		name, place := key.Value, fmt.Sprintf("%s:%d", path, key.Line)
		to := c.settings()[name]
		switch {
		case to == nil:
			errs = append(errs, fmt.Errorf("configuration: %s: %s: unknown setting", place, name))
			continue
		case seen[name]:
			errs = append(errs, fmt.Errorf("configuration: %s: %s: given twice", place, name))
			continue
		case f.Changed(name):
			to = new(config).settings()[name] // the flag goes before it; a mistake stays one
		default:
			c.places[name] = place
		}
		seen[name] = true
		if p, ok := to.(*profiles); ok {
			errs = append(errs, p.read(path, value))
			continue
		}
		if value.Tag == "!!null" || value.Decode(to) != nil {
			errs = append(errs, fmt.Errorf("configuration: %s: %s: must be %s", place, name, wanted(to)))
		}
	}
	return errors.Join(errs...)
}

// wanted says what a setting has to be.
func wanted(to any) string {
	switch to.(type) {
	case *bool:
		return "true or false"
	case *[]string:
		return "a list of texts"
	case *map[string]string:
		return "names with texts"
	case *int:
		return "a number"
	case *time.Duration:
		return "a duration, for example 48h"
	default:
		return "a text"
	}
}

// wrong says what is wrong with a setting, and where it was given.
func (c *config) wrong(name, format string, args ...any) error {
	err := fmt.Errorf(name+": "+format, args...)
	if place := c.places[name]; place != "" {
		return fmt.Errorf("configuration: %s: %w", place, err)
	}
	return err
}

// check refuses what would only show later.
func (c *config) check() error {
	if c.Socket == "" {
		c.Socket = c.RunDir + "/vmsnapd.sock"
	}
	for name, path := range map[string]string{"state-dir": c.StateDir, "run-dir": c.RunDir, "socket": c.Socket} {
		if path == "" || path[0] != '/' {
			return c.wrong(name, "%q is not an absolute path", path)
		}
	}
	if c.OverlayDir != "" { // whether it is there shows at each snapshot: it may be mounted late
		if !filepath.IsAbs(c.OverlayDir) {
			return c.wrong("overlay-dir", "%q is not an absolute path", c.OverlayDir)
		}
		c.OverlayDir = filepath.Clean(c.OverlayDir)
	}
	if c.MemoryDir != "" {
		if !filepath.IsAbs(c.MemoryDir) {
			return c.wrong("memory-dir", "%q is not an absolute path", c.MemoryDir)
		}
		c.MemoryDir = filepath.Clean(c.MemoryDir)
	}
	if k := c.MemoryKey; k != "" && !filepath.IsAbs(k) && (filepath.Base(k) != k || k == "." || k == "..") {
		return c.wrong("memory-key", "%q is neither an absolute path nor the name of a credential", k)
	}
	if _, err := launch.ParseKind(c.Launcher); err != nil {
		return c.wrong("launcher", "%q is not auto, unit, systemd, exec or external", c.Launcher)
	}
	if len(c.Socket) > 107 {
		return c.wrong("socket", "%q is longer than the 107 bytes that a Unix socket's path may have", c.Socket)
	}
	switch c.LogLevel {
	case "debug", "info", "warn", "error":
	default:
		return c.wrong("log-level", "%q is not debug, info, warn or error", c.LogLevel)
	}
	if c.EventKeep < 1 {
		return c.wrong("event-keep", "%d is less than 1", c.EventKeep)
	}
	if c.MaxOperations < 0 {
		return c.wrong("max-operations", "%d is less than 0", c.MaxOperations)
	}
	if c.MaxOperationsPerStorage < 0 {
		return c.wrong("max-operations-per-storage", "%d is less than 0", c.MaxOperationsPerStorage)
	}
	if c.ScheduleMaxKeep < 0 {
		return c.wrong("schedule-max-keep", "%d is less than 0", c.ScheduleMaxKeep)
	}
	if c.ScheduleMaxAge < 0 {
		return c.wrong("schedule-max-age", "%s is less than 0", c.ScheduleMaxAge)
	}
	if c.EventMaxAge <= 0 {
		return c.wrong("event-max-age", "%s is not more than 0", c.EventMaxAge)
	}
	if err := errors.Join(c.checkHooks(), c.checkStorage()); err != nil {
		return err
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return c.wrong("log-format", "%q is not text or json", c.LogFormat)
	}
	if c.MetricsListen != "" {
		if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil {
			return c.wrong("metrics-listen", "%w", err)
		}
	}
	return nil
}

// checkStorage refuses what says nothing of merges, chains and space.
func (c *config) checkStorage() error {
	if c.MergeSpeed < 0 {
		return c.wrong("merge-speed", "%d is less than 0", c.MergeSpeed)
	}
	if c.UpkeepSpeed < 0 {
		return c.wrong("upkeep-speed", "%d is less than 0", c.UpkeepSpeed)
	}
	if c.UpkeepInterval < 0 {
		return c.wrong("upkeep-interval", "%s is less than 0", c.UpkeepInterval)
	}
	if c.MaxChain < 0 || c.MaxChain == 1 {
		return c.wrong("max-chain", "%d is neither 0 nor at least 2", c.MaxChain)
	}
	if c.LowSpace < 0 {
		return c.wrong("low-space", "%d is less than 0", c.LowSpace)
	}
	return nil
}

// checkGroups refuses groups that do not exist. Only the daemon asks for it: the
// last thaw must not fail because of them.
func (c *config) checkGroups() error {
	if c.SocketGroup != "" {
		if _, err := user.LookupGroup(c.SocketGroup); err != nil {
			return c.wrong("socket-group", "%w", err)
		}
	}
	for name, groups := range map[string][3][]string{
		"viewers": {c.Viewers}, "operators": {nil, c.Operators}, "admins": {nil, nil, c.Admins},
	} {
		if _, err := rpc.ResolveRoles(0, groups[0], groups[1], groups[2]); err != nil {
			return c.wrong(name, "%w", err)
		}
	}
	return nil
}
