package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// config is the daemon's settings. Each has a flag of the same name, which
// goes before the file, and a default that works.
type config struct {
	StateDir      string   `yaml:"state-dir"`
	RunDir        string   `yaml:"run-dir"`
	Socket        string   `yaml:"socket"`
	SocketGroup   string   `yaml:"socket-group"`
	MetricsListen string   `yaml:"metrics-listen"`
	MetricsConfig string   `yaml:"metrics-config"`
	VMsDir        string   `yaml:"vms-dir"`
	LogLevel      string   `yaml:"log-level"`
	LogFormat     string   `yaml:"log-format"`
	ScanOnly      bool     `yaml:"scan-only"`
	ListedOnly    bool     `yaml:"listed-only"`
	Viewers       []string `yaml:"viewers"`
	Operators     []string `yaml:"operators"`
	Admins        []string `yaml:"admins"`
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
	f.StringVar(&c.LogLevel, "log-level", "info", "`level`: debug, info, warn or error")
	f.StringVar(&c.LogFormat, "log-format", "text", "`format`: text or json")
	f.BoolVar(&c.ScanOnly, "scan-only", false, "find VMs by scanning /proc only, without process events")
	f.BoolVar(&c.ListedOnly, "listed-only", false, "manage only the VMs that a file in --vms-dir names")
	f.StringSliceVar(&c.Viewers, "viewers", nil, "`groups` that may look")
	f.StringSliceVar(&c.Operators, "operators", nil, "`groups` that may also take snapshots, freeze and thaw")
	f.StringSliceVar(&c.Admins, "admins", nil, "`groups` that may do everything")
}

// load reads the file and then lets the flags that were given go before it.
// The default file may be absent; one that was named must exist.
func (c *config) load(path string, named bool, f *pflag.FlagSet) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return c.check()
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	given := map[string]string{}
	f.Visit(func(fl *pflag.Flag) { given[fl.Name] = fl.Value.String() })
	kept := *c
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	kept.restore(c, given)
	if err := c.check(); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	return nil
}

// restore puts the flags that were given back over what the file said.
func (c *config) restore(into *config, given map[string]string) {
	for name, pair := range map[string][2]*string{
		"state-dir": {&c.StateDir, &into.StateDir}, "run-dir": {&c.RunDir, &into.RunDir}, "socket": {&c.Socket, &into.Socket},
		"socket-group": {&c.SocketGroup, &into.SocketGroup}, "metrics-listen": {&c.MetricsListen, &into.MetricsListen},
		"metrics-config": {&c.MetricsConfig, &into.MetricsConfig}, "vms-dir": {&c.VMsDir, &into.VMsDir},
		"log-level": {&c.LogLevel, &into.LogLevel}, "log-format": {&c.LogFormat, &into.LogFormat},
	} {
		if _, ok := given[name]; ok {
			*pair[1] = *pair[0]
		}
	}
	for name, pair := range map[string][2]*[]string{
		"viewers": {&c.Viewers, &into.Viewers}, "operators": {&c.Operators, &into.Operators}, "admins": {&c.Admins, &into.Admins},
	} {
		if _, ok := given[name]; ok {
			*pair[1] = *pair[0]
		}
	}
	for name, pair := range map[string][2]*bool{
		"scan-only": {&c.ScanOnly, &into.ScanOnly}, "listed-only": {&c.ListedOnly, &into.ListedOnly},
	} {
		if _, ok := given[name]; ok {
			*pair[1] = *pair[0]
		}
	}
}

// check refuses what would only show later.
func (c *config) check() error {
	if c.Socket == "" {
		c.Socket = c.RunDir + "/vmsnapd.sock"
	}
	for name, path := range map[string]string{"state-dir": c.StateDir, "run-dir": c.RunDir, "socket": c.Socket} {
		if path == "" || path[0] != '/' {
			return fmt.Errorf("%s: %q is not an absolute path", name, path)
		}
	}
	if len(c.Socket) > 107 {
		return fmt.Errorf("socket: %q is longer than the 107 bytes that a Unix socket's path may have", c.Socket)
	}
	switch c.LogLevel {
	case "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("log-level: %q is not debug, info, warn or error", c.LogLevel)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return fmt.Errorf("log-format: %q is not text or json", c.LogFormat)
	}
	return nil
}
