package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// loadConfig loads a configuration file's text with flags.
func loadConfig(t *testing.T, text string, args ...string) (config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vmsnapd.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var c config
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	c.flags(f)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	return c, c.load(path, true, f)
}

func TestConfigOrder(t *testing.T) {
	c, err := loadConfig(t, "state-dir: /srv/a\nlog-level: debug\nadmins: [wheel]\nscan-only: true\n",
		"--log-level", "warn", "--admins", "root,adm", "--scan-only=false")
	if err != nil {
		t.Fatal(err)
	}
	if c.StateDir != "/srv/a" || c.LogLevel != "warn" || strings.Join(c.Admins, " ") != "root adm" || c.ScanOnly ||
		c.MetricsListen != "127.0.0.1:9777" || c.Socket != "/run/vmsnap/vmsnapd.sock" {
		t.Errorf("%+v", c)
	}
}

func TestConfigEmpty(t *testing.T) {
	if c, err := loadConfig(t, ""); err != nil || c.StateDir != "/var/lib/vmsnap" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestConfigErrorsNameTheSetting(t *testing.T) {
	for text, want := range map[string]string{
		"run-dir: /run/x\nstate-dri: /srv\n":          "line 2",
		"scan-only: perhaps\n":                        "line 1",
		"state-dir: relative\n":                       "state-dir",
		"log-level: loud\n":                           "log-level",
		"log-format: xml\n":                           "log-format",
		"socket: /" + strings.Repeat("x", 110) + "\n": "socket",
	} {
		_, err := loadConfig(t, text)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "vmsnapd.yaml") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestConfigFileThatWasNamedMustExist(t *testing.T) {
	var c config
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	c.flags(f)
	missing := filepath.Join(t.TempDir(), "x.yaml")
	if err := c.load(missing, true, f); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a named file that is missing: %v", err)
	}
	if err := c.load(missing, false, f); err != nil {
		t.Errorf("the default file is missing: %v", err)
	}
}
