package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestRPM installs the RPM package in an empty root and removes it.
func TestRPM(t *testing.T) {
	file := rpmFile(t, version1)
	root := t.TempDir()
	rpm := func(args ...string) string {
		t.Helper()
		return output(t, "rpm", append([]string{"--root", root}, args...)...)
	}
	// There is no shell in that root: the scriptlets have a test of their own.
	rpm("--install", "--nodeps", "--noscripts", file)
	if out := rpm("--verify", "--nodeps", "--noscripts", "vmsnap"); out != "" {
		t.Errorf("what is installed differs from the package:\n%s", out)
	}
	for path, mode := range map[string]os.FileMode{
		"/usr/bin/vmsnap": 0o755, "/usr/bin/vmsnapd": 0o755, "/etc/vmsnap/vmsnapd.yaml": 0o644,
		"/usr/lib/systemd/system/vmsnapd.service": 0o644, "/usr/lib/systemd/system/vmsnapd.socket": 0o644,
		"/usr/lib/sysusers.d/vmsnap.conf": 0o644, "/usr/share/man/man8/vmsnapd.8.gz": 0o644,
		"/usr/share/man/man1/vmsnap-snapshot-create.1.gz": 0o644, "/usr/share/zsh/site-functions/_vmsnap": 0o644,
		"/usr/share/bash-completion/completions/vmsnap": 0o644, "/usr/share/fish/vendor_completions.d/vmsnap.fish": 0o644,
		"/usr/share/licenses/vmsnap/LICENSE": 0o644, "/usr/share/vmsnap/unprivileged.conf": 0o644,
		"/usr/share/vmsnap/polkit.rules": 0o644, "/usr/share/vmsnap/prometheus/vmsnap.rules.yml": 0o644,
		"/usr/share/vmsnap/grafana/vmsnap.json": 0o644,
	} {
		if fi, err := os.Stat(filepath.Join(root, path)); err != nil || fi.Mode().Perm() != mode || fi.Size() == 0 {
			t.Errorf("%s: %v, want mode %o", path, err, mode)
		}
	}
	if got := strings.TrimSpace(rpm("--query", "--configfiles", "vmsnap")); got != "/etc/vmsnap/vmsnapd.yaml" {
		t.Errorf("configuration files: %s", got)
	}
	if out := output(t, filepath.Join(root, "usr/bin/vmsnapd"), "--version"); !strings.Contains(out, version1) {
		t.Errorf("vmsnapd --version: %s", out)
	}

	// An upgrade keeps what an administrator has set.
	config := filepath.Join(root, "etc/vmsnap/vmsnapd.yaml")
	if err := os.WriteFile(config, []byte("log-level: debug\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	rpm("--upgrade", "--nodeps", "--noscripts", rpmFile(t, version2))
	if data, err := os.ReadFile(config); err != nil || string(data) != "log-level: debug\n" {
		t.Errorf("after an upgrade the configuration is %q, %v", data, err)
	}
	rpm("--erase", "--nodeps", "--noscripts", "vmsnap")
	if _, err := os.Stat(filepath.Join(root, "usr/bin/vmsnapd")); err == nil {
		t.Error("vmsnapd is left behind")
	}
}

// TestRPMScriptlets runs the scriptlets with programs that only say how they are
// called, in the situations that rpm tells by $1.
func TestRPMScriptlets(t *testing.T) {
	const (
		sysusers = "systemd-sysusers /usr/lib/sysusers.d/vmsnap.conf"
		reload   = "systemctl daemon-reload"
	)
	for _, test := range []struct {
		tag, count string
		want       []string
	}{
		{"%{POSTIN}", "1", []string{sysusers, "systemctl --no-reload preset vmsnapd.socket vmsnapd.service", reload}},
		{"%{POSTIN}", "2", []string{sysusers, reload}},
		{"%{PREUN}", "1", nil},
		{"%{PREUN}", "0", []string{"systemctl --no-reload disable --now vmsnapd.socket vmsnapd.service"}},
		{"%{POSTUN}", "1", []string{reload, "systemctl try-restart vmsnapd.service"}},
		{"%{POSTUN}", "0", []string{reload}},
	} {
		for _, status := range []string{"0", "1"} { // a scriptlet never fails
			t.Run(test.tag+" "+test.count+" "+status, func(t *testing.T) {
				script := output(t, "rpm", "--query", "--package", "--queryformat", test.tag, rpmFile(t, version1))
				dir := t.TempDir()
				calls := filepath.Join(dir, "calls")
				for _, name := range []string{"systemctl", "systemd-sysusers"} {
					stub := "#!/bin/sh\necho " + name + ` "$@" >>` + calls + "\nexit " + status + "\n"
					if err := os.WriteFile(filepath.Join(dir, name), []byte(stub), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				cmd := exec.Command("/bin/sh", "-eu", "-c", script, "scriptlet", test.count)
				cmd.Env = []string{"PATH=" + dir}
				if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
					t.Fatalf("%v: %s", err, out)
				}
				var got []string
				if data, err := os.ReadFile(calls); err == nil {
					got = strings.Split(strings.TrimSpace(string(data)), "\n")
				}
				if !slices.Equal(got, test.want) {
					t.Errorf("called %q, want %q", got, test.want)
				}
			})
		}
	}
}
