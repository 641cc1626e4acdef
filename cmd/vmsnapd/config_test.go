package main

import (
	"errors"
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
	return c, errors.Join(c.load(path, true, f), c.checkGroups())
}

func TestConfigOrder(t *testing.T) {
	c, err := loadConfig(t, "state-dir: /srv/a\noverlay-dir: /srv/overlays/\nlog-level: debug\nadmins: [daemon]\nscan-only: true\n",
		"--log-level", "warn", "--admins", "root,adm", "--scan-only=false")
	if err != nil {
		t.Fatal(err)
	}
	if c.StateDir != "/srv/a" || c.OverlayDir != "/srv/overlays" || c.LogLevel != "warn" || strings.Join(c.Admins, " ") != "root adm" || c.ScanOnly ||
		c.MetricsListen != "127.0.0.1:9777" || c.Socket != "/run/vmsnap/vmsnapd.sock" {
		t.Errorf("%+v", c)
	}
}

func TestConfigFlagsAreNotTheFilesMistakes(t *testing.T) {
	_, err := loadConfig(t, "log-level: info\n", "--log-level", "loud")
	if err == nil || !strings.HasPrefix(err.Error(), "log-level: ") {
		t.Errorf("a wrong flag: %v", err)
	}
	if _, err := loadConfig(t, "scan-only: perhaps\n", "--scan-only"); err == nil {
		t.Error("a mistake in the file is hidden by a flag")
	}
}

func TestConfigEmpty(t *testing.T) {
	if c, err := loadConfig(t, ""); err != nil || c.StateDir != "/var/lib/vmsnap" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestConfigErrorsNameTheSetting(t *testing.T) {
	for text, want := range map[string]string{
		"run-dir: /run/x\nstate-dri: /srv\n":          "vmsnapd.yaml:2: state-dri: unknown setting",
		"run-dir: /run/x\nrun-dir: /run/y\n":          "vmsnapd.yaml:2: run-dir: given twice",
		"scan-only: perhaps\n":                        "vmsnapd.yaml:1: scan-only: must be true or false",
		"operators: [\"0:web[1]\"]\n":                 "vmsnapd.yaml:1: operators: group \"0\" of role operator: the pattern \"web[1]\"",
		"viewers: {a: b}\n":                           "vmsnapd.yaml:1: viewers: must be a list",
		"log-level:\n":                                "vmsnapd.yaml:1: log-level: must be a text",
		"# x\nstate-dir: relative\n":                  "vmsnapd.yaml:2: state-dir: ",
		"log-level: loud\n":                           "vmsnapd.yaml:1: log-level: ",
		"overlay-dir: overlays\n":                     "vmsnapd.yaml:1: overlay-dir: ",
		"log-format: xml\n":                           "vmsnapd.yaml:1: log-format: ",
		"socket: /" + strings.Repeat("x", 110) + "\n": "vmsnapd.yaml:1: socket: ",
		"metrics-listen: localhost\n":                 "vmsnapd.yaml:1: metrics-listen: ",
		"max-operations: -1\n":                        "vmsnapd.yaml:1: max-operations: ",
		"merge-speed: -1\n":                           "vmsnapd.yaml:1: merge-speed: ",
		"upkeep-speed: -1\n":                          "vmsnapd.yaml:1: upkeep-speed: ",
		"upkeep-interval: -1s\n":                      "vmsnapd.yaml:1: upkeep-interval: ",
		"max-chain: 1\n":                              "vmsnapd.yaml:1: max-chain: ",
		"low-space: -1\n":                             "vmsnapd.yaml:1: low-space: ",
		"resume-guests: sometimes\n":                  "vmsnapd.yaml:1: resume-guests: must be true or false",
		"max-operations-per-storage: many\n":          "vmsnapd.yaml:1: max-operations-per-storage: must be a number",
		"hooks-dir: hooks.d\n":                        "vmsnapd.yaml:1: hooks-dir: ",
		"hooks-fail-closed: [pre-frees]\n":            `vmsnapd.yaml:1: hooks-fail-closed: "pre-frees" is no phase; known are [pre-freeze `,
		"hooks-fail-closed: [on-failure]\n":           "vmsnapd.yaml:1: hooks-fail-closed: ",
		"hook-timeout: 0s\n":                          "vmsnapd.yaml:1: hook-timeout: ",
		"hook-timeouts: {post-snapshot: soon}\n":      "vmsnapd.yaml:1: hook-timeouts: post-snapshot: ",
		"hook-timeouts: {later: 1h}\n":                `vmsnapd.yaml:1: hook-timeouts: "later" is no phase`,
		"hook-timeouts: 1h\n":                         "vmsnapd.yaml:1: hook-timeouts: must be names",
		"socket-group: no-such-group-1\n":             "vmsnapd.yaml:1: socket-group: ",
		"operators: [no-such-group-1]\n":              "vmsnapd.yaml:1: operators: ",
		"- a\n":                                       "vmsnapd.yaml:1: must be settings",
	} {
		_, err := loadConfig(t, text)
		if err == nil || !strings.Contains(err.Error(), want) {
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

// FuzzConfig takes any text for a settings file: it is refused, or what it says
// can be used.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{
		"", "state-dir: /srv/a\noverlay-dir: /srv/overlays/\nlog-level: debug\nadmins: [daemon]\nscan-only: true\n",
		"hook-timeouts: {post-snapshot: 1h}\nhooks-fail-closed: [pre-freeze]\n", "event-max-age: 48h\nevent-keep: 50\n",
		"profiles:\n  nightly:\n    exclude: 'scr*'\n    quiesce: none\n    labels: {of: nightly}\n",
		"a: &a [*a]\n", "max-operations: 99999999999999999999\n", "viewers: [\"\\x00\"]\n", "webhook-url: http://[::1]:x\n", "socket: ../x\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := loadConfig(t, text)
		if err != nil {
			if len(err.Error()) > 1<<16 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		for name, path := range map[string]string{"state-dir": c.StateDir, "run-dir": c.RunDir, "socket": c.Socket} {
			if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
				t.Errorf("%s is %q", name, path)
			}
		}
		if c.MaxOperations < 0 || c.MaxOperationsPerStorage < 0 || c.EventKeep < 0 || c.EventMaxAge < 0 || c.HookTimeout < 0 {
			t.Errorf("%+v", c)
		}
	})
}
