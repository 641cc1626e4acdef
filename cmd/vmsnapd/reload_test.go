package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestSourceIsReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vmsnapd.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var given config
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	given.flags(f)
	if err := f.Parse([]string{"--state-dir", "/srv/flag", "--viewers", "adm"}); err != nil {
		t.Fatal(err)
	}
	from := source{flags: f, given: given, file: path, named: true}
	write("log-level: debug\nadmins: [root]\nstate-dir: /srv/file\nviewers: [daemon]\n")
	first, err := from.load()
	if err != nil || first.LogLevel != "debug" || first.StateDir != "/srv/flag" || strings.Join(first.Viewers, " ") != "adm" {
		t.Fatalf("%+v, %v", first, err)
	}
	write("operators: [adm]\nstate-dir: /srv/other\nrun-dir: /run/other\n")
	second, err := from.load()
	if err != nil || second.LogLevel != "info" || len(second.Admins) != 0 || second.StateDir != "/srv/flag" {
		t.Fatalf("%+v, %v", second, err)
	}
	if got, want := strings.Join(changed(first, second), " "), "admins log-level operators run-dir socket"; got != want {
		t.Errorf("changed: %s, want %s", got, want)
	}
	write("log-level: loud\n")
	if _, err := from.load(); err == nil {
		t.Error("a mistake is taken")
	}
}
