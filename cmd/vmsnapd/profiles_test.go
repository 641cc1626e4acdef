package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

func TestProfiles(t *testing.T) {
	c, err := loadConfig(t, `
profiles:
  nightly:
    disks: [root, "data*"]
    exclude: scratch
    quiesce: require
    labels: {team: infra}
    hooks: none
    keep-daily: 7
    max-age: 30d
    max-space: 100GiB
  with.memory-2:
    memory: true
    memory-strategy: background
    max-pause: 200ms
    compress: true
    hooks: /etc/vmsnap/other.d
`)
	if err != nil {
		t.Fatal(err)
	}
	none, other := "", "/etc/vmsnap/other.d"
	want := profiles{
		"nightly": {
			Disks: []string{"root", "data*"}, Exclude: []string{"scratch"}, Quiesce: agent.QuiesceRequire, Labels: map[string]string{"team": "infra"},
			Hooks: &none, Retention: schedule.Retention{Daily: 7, MaxAge: 30 * 24 * time.Hour, MaxSpace: 100 << 30},
		},
		"with.memory-2": {Memory: true, Strategy: agent.MemoryBackground, MaxPause: 200 * time.Millisecond, Compress: true, Hooks: &other},
	}
	if d := cmp.Diff(want, c.Profiles); d != "" {
		t.Error(d)
	}
}

func TestProfileMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"profiles: nightly\n":                                "vmsnapd.yaml:1: profiles: must be names",
		"profiles:\n  a/b: {}\n":                             `vmsnapd.yaml:2: profiles: "a/b": a name has`,
		"profiles:\n  a: x\n":                                "vmsnapd.yaml:2: profiles: a: must be options",
		"profiles:\n  a: {}\n  a: {}\n":                      "vmsnapd.yaml:3: profiles: a: given twice",
		"profiles:\n  a:\n    qiesce: none\n":                "vmsnapd.yaml:3: profiles: a: qiesce: unknown option; known are allow-partial, compress",
		"profiles:\n  a:\n    quiesce: maybe\n":              `vmsnapd.yaml:3: profiles: a: quiesce: "maybe" is none of [prefer require none]`,
		"profiles:\n  a:\n    memory: 7\n":                   "vmsnapd.yaml:3: profiles: a: memory: must be true or false",
		"profiles:\n  a:\n    disks: ['[']\n":                `vmsnapd.yaml:3: profiles: a: disks: "[" is not a pattern`,
		"profiles:\n  a:\n    disks: {}\n":                   "vmsnapd.yaml:3: profiles: a: disks: must be a pattern",
		"profiles:\n  a:\n    lease: 0s\n":                   "vmsnapd.yaml:3: profiles: a: lease: ",
		"profiles:\n  a:\n    lease: 1h\n":                   "vmsnapd.yaml:2: profiles: a: a freeze timeout of ",
		"profiles:\n  a:\n    max-age: 99999d\n":             "vmsnapd.yaml:3: profiles: a: max-age: ",
		"profiles:\n  a:\n    max-space: 1GB\n":              "vmsnapd.yaml:3: profiles: a: max-space: ",
		"profiles:\n  a:\n    keep-last: -1\n":               "vmsnapd.yaml:2: profiles: a: keep-last is -1",
		"profiles:\n  a:\n    keep-last: few\n":              "vmsnapd.yaml:3: profiles: a: keep-last: must be a number",
		"profiles:\n  a:\n    hooks: hooks.d\n":              "vmsnapd.yaml:3: profiles: a: hooks: must be none or the absolute",
		"profiles:\n  a:\n    lease: 1s\n    lease: 2s\n":    "vmsnapd.yaml:4: profiles: a: lease: given twice",
		"profiles:\n  a:\n    labels: [x]\n":                 "vmsnapd.yaml:3: profiles: a: labels: must be names with texts",
		"profiles:\n  a: {x: 1}\nlog-level: loud\n":          "vmsnapd.yaml:2: profiles: a: x: unknown",
		"profiles:\n  a:\n    compress: true\n    strict: 3": "vmsnapd.yaml:4: profiles: a: strict: must be true or false",
	} {
		if _, err := loadConfig(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
