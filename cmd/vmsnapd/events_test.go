package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSinks(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const hook = "webhook-url: https://example.org/x\n"
	for name, x := range map[string]struct {
		settings string
		sinks    int
		wrong    string
	}{
		"none":           {"", 0, ""},
		"journal":        {"event-journal: true\n", 1, ""},
		"webhook":        {"event-journal: true\n" + hook, 2, ""},
		"with a secret":  {hook + "webhook-secret: " + file("good", "s3cret\n", 0o600) + "\n", 1, ""},
		"for its group":  {hook + "webhook-secret: " + file("group", "s3cret\n", 0o640) + "\n", 1, ""},
		"for everyone":   {hook + "webhook-secret: " + file("open", "s3cret\n", 0o644) + "\n", 0, "vmsnapd.yaml:2: webhook-secret: " + dir + "/open has the mode 0644"},
		"empty":          {hook + "webhook-secret: " + file("empty", "\n", 0o600) + "\n", 0, "is empty"},
		"a whole disk":   {hook + "webhook-secret: " + file("long", strings.Repeat("x", 5000), 0o600) + "\n", 0, "at most 4096"},
		"not there":      {hook + "webhook-secret: /no/such/file\n", 0, "no such file"},
		"not a web hook": {"webhook-url: mailto:x@example.org\n", 0, "vmsnapd.yaml:1: webhook-url: "},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := loadConfig(t, x.settings)
			if err != nil {
				t.Fatal(err)
			}
			all, err := sinks(c)
			if (err != nil) != (x.wrong != "") || err != nil && !strings.Contains(err.Error(), x.wrong) || len(all) != x.sinks {
				t.Errorf("%d sinks, %v; want %d, %q", len(all), err, x.sinks, x.wrong)
			}
		})
	}
}

func TestWebhookSecretOfTheUnit(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, webhookCredential), []byte("s3cret"), 0o400); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if secret, err := webhookSecret(config{}); string(secret) != "s3cret" || err != nil {
		t.Errorf("%q, %v", secret, err)
	}
}

// TestUnitHandsOverCredentials has systemd hand over what is looked for.
func TestUnitHandsOverCredentials(t *testing.T) {
	unit, err := os.ReadFile("../../systemd/vmsnapd.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{metricsCredential, webhookCredential} {
		if !strings.Contains(string(unit), "\nLoadCredential="+name+"\n") {
			t.Errorf("the unit does not load %s", name)
		}
	}
}

func TestEventSettings(t *testing.T) {
	c, err := loadConfig(t, "event-keep: 50\nevent-max-age: 48h\n")
	if err != nil || c.EventKeep != 50 || c.EventMaxAge != 48*time.Hour {
		t.Errorf("%d, %s, %v", c.EventKeep, c.EventMaxAge, err)
	}
	for text, want := range map[string]string{
		"event-keep: many\n":      "vmsnapd.yaml:1: event-keep: must be a number",
		"event-keep: 0\n":         "vmsnapd.yaml:1: event-keep: ",
		"event-max-age: 90 d\n":   "vmsnapd.yaml:1: event-max-age: must be a duration",
		"event-max-age: -1s\n":    "vmsnapd.yaml:1: event-max-age: ",
		"schedule-max-keep: -1\n": "vmsnapd.yaml:1: schedule-max-keep: ",
		"schedule-max-age: -1h\n": "vmsnapd.yaml:1: schedule-max-age: ",
		"webhook-url: {a: b}\n":   "vmsnapd.yaml:1: webhook-url: must be a text",
		"event-journal: always\n": "vmsnapd.yaml:1: event-journal: must be true or false",
	} {
		if _, err := loadConfig(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want %q", text, err, want)
		}
	}
}
