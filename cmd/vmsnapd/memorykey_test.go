package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
)

func TestMemoryKey(t *testing.T) {
	dir := t.TempDir()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"vmsnap.memory": {id.String() + "\n", 0o400}, "open": {id.String(), 0o604}, "empty": {"", 0o600},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(file.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, file.mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	for _, setting := range []string{"vmsnap.memory", filepath.Join(dir, "vmsnap.memory")} {
		if key, err := sealing(config{MemoryKey: setting}).Key(); err != nil || key.Recipient() != id.Recipient().String() {
			t.Errorf("%s: %v", setting, err)
		}
	}
	if sealing(config{}) != nil {
		t.Error("memory is encrypted without a setting")
	}
	for setting, want := range map[string]string{
		"vmsnap.other": "no such file", filepath.Join(dir, "open"): "others may read it", "empty": "no identity", dir: "is no file",
	} {
		if _, err := readKey(setting); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), id.String()) {
			t.Errorf("%s: %v, want %q", setting, err, want)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := readKey("vmsnap.memory"); err == nil || !strings.Contains(err.Error(), "LoadCredential=vmsnap.memory") {
		t.Errorf("without credentials: %v", err)
	}
}
