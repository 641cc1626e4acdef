package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

const scheduleCompletions = "dbs\tcron\nnightly\tdaily\n"

const vmCompletions = "web\trunning,frozen\ndatenbank-東京\tstopped\nlegacy\tunknown\n"

func TestCompletion(t *testing.T) {
	socket := serve(t, rpctest.Sample())
	for line, want := range map[string]string{
		"vm show ":                       vmCompletions,
		"vm forget ":                     vmCompletions,
		"freeze ":                        vmCompletions,
		"thaw ":                          vmCompletions,
		"snapshot list ":                 vmCompletions,
		"snapshot create ":               vmCompletions,
		"snapshot create web ":           "",
		"snapshot create web --disk ":    "root\t20 GiB\ndata\t500 GiB\n",
		"snapshot create --exclude ":     "",
		"snapshot create web --quiesce ": "require\nprefer\nnone\n",
		"snapshot list --sort ":          "time\nname\nspace\n",
		"snapshot show ": "web/before-upgrade\tfilesystem, 3h ago\nweb/nightly\tcrash,partial, 31h ago\n" +
			"datenbank-東京/stand\tcrash, 2d ago\nweb/live\tmemory, 5d ago\nweb/alpha\toffline, 40d ago\n",
		"snapshot rename web/nightly ": "",
		"operation show ": "0badcafe\tfreeze of web, running\nc0ffee02\tsnapshot of legacy, failed\n" +
			"c0ffee01\tsnapshot of web, succeeded\n",
		"operation cancel ": "0badcafe\tfreeze of web, running\n",
		"operation watch ":  "0badcafe\tfreeze of web, running\n",
		"vm list -o ":       "table\nwide\njson\nyaml\nname\n",

		"event list ":             vmCompletions,
		"event watch --severity ": "info\nwarning\nerror\n",
		"event watch --kind ":     strings.Join(eventKinds(), "\n") + "\n",
		"event list --operation ": "0badcafe\tfreeze of web, running\nc0ffee02\tsnapshot of legacy, failed\n" +
			"c0ffee01\tsnapshot of web, succeeded\n",
		"event watch --since ": "",

		"schedule show ":                 scheduleCompletions,
		"schedule edit ":                 scheduleCompletions,
		"schedule delete ":               scheduleCompletions,
		"schedule create ":               vmCompletions,
		"schedule create web --disk ":    "root\t20 GiB\ndata\t500 GiB\n",
		"schedule create web --missed ":  "catch-up\nskip\n",
		"snapshot list web --disk ":      "root\t20 GiB\ndata\t500 GiB\n",
		"schedule create web --monthly ": "1\n15\nlast\n",
	} {
		t.Run(line, func(t *testing.T) {
			got := command(t, socket, append([]string{"__complete"}, strings.Split(line, " ")...)...)
			text, directive, _ := strings.Cut(got.stdout, ":")
			if diff := cmp.Diff(want, text); diff != "" || got.code != 0 {
				t.Errorf("exit %d, completions (-want +got):\n%s", got.code, diff)
			}
			if directive != "4\n" { // no file names
				t.Errorf("the directive is %q", directive)
			}
		})
	}
}

// TestCompletionDoesNotWait has a daemon that never answers.
func TestCompletionDoesNotWait(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	began := time.Now()
	got := command(t, socket, "__complete", "vm", "show", "")
	if took := time.Since(began); took > 2*completeTimeout || got.stdout != ":4\n" {
		t.Errorf("after %s: %+v", took, got)
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if got := command(t, "", "completion", shell); got.code != 0 || !strings.Contains(got.stdout, "__complete") {
			t.Errorf("%s: exit %d", shell, got.code)
		}
	}
}
