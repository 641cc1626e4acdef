// Package docs_test proves the documents: what they show is run, on a real
// guest, and what they list is compared with the code.
//
// Each ```sh block of a document is run, in order, on a host of the document's
// own (newHost). It must succeed, unless its last line ends in
// "# exits with N". A ```text block that follows at once is what it prints,
// but for ids, times, sizes and the like; a line "…" in it stands for any
// lines. A comment "<!-- test: the guest shuts down -->" or "… the guest
// starts" is done where it stands. ```go blocks are programs, which are run;
// ```yaml blocks begin with the path of the file that they are, and are read.
package docs_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/agent/discover"
)

// block is a part of a document that is proven.
type block struct {
	line   int
	kind   string // sh, go, yaml, or test for a direction
	text   string
	output string // the text block that follows
	shown  bool   // there is such a block
}

var direction = regexp.MustCompile(`^<!-- test: (.*) -->$`)

// blocks returns the blocks of a document.
func blocks(t *testing.T, file string) []block {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var all []block
	lines := strings.Split(string(data), "\n")
	previous := -1 // the line on which the last program or script ends
	for i := 0; i < len(lines); i++ {
		if m := direction.FindStringSubmatch(lines[i]); m != nil {
			all = append(all, block{line: i + 1, kind: "test", text: m[1]})
		}
		kind, fenced := strings.CutPrefix(strings.TrimSpace(lines[i]), "```")
		if !fenced {
			continue
		}
		b := block{line: i + 1, kind: kind}
		for i++; i < len(lines) && strings.TrimSpace(lines[i]) != "```"; i++ {
			b.text += lines[i] + "\n"
		}
		switch kind {
		case "text":
			if b.line == previous+1 {
				all[len(all)-1].output, all[len(all)-1].shown = b.text, true
			}
		case "sh", "go":
			previous = i + 1
			all = append(all, b)
		case "yaml":
			all = append(all, b)
		case "mermaid", "proto", "json", "js":
		default:
			t.Errorf("%s:%d: a block of the kind %q, which nobody proves", file, b.line, kind)
		}
	}
	return all
}

// documents returns the documents of this project.
func documents(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.md")
	if err != nil || len(files) == 0 {
		t.Fatalf("documents: %v, %v", files, err)
	}
	return append(files, "../README.md", "../CHANGELOG.md")
}

func TestQEMUExamples(t *testing.T) {
	for _, file := range documents(t) {
		if file == "install.md" { // needs a host of its own: the test of the packages runs it
			continue
		}
		var run []block
		for _, b := range blocks(t, file) {
			if b.kind != "yaml" {
				run = append(run, b)
			}
		}
		if len(run) == 0 {
			continue
		}
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			for _, b := range run {
				if !t.Failed() { // what follows builds on what was done
					h.prove(file, b)
				}
			}
		})
	}
}

// prove does what a block says.
func (h *host) prove(file string, b block) {
	h.t.Helper()
	var r result
	switch b.kind {
	case "test":
		h.direct(b.text)
		return
	case "go":
		r = h.program(b.text)
	default:
		r = h.shell(b.text)
	}
	if want := exitCode(b.text); r.code != want {
		h.t.Errorf("%s:%d: exit code %d, not %d:\n%s\n%s%s", file, b.line, r.code, want, b.text, r.stdout, r.stderr)
		return
	}
	if b.shown && !matches(normal(b.output), normal(r.stdout)) {
		h.t.Errorf("%s:%d: it prints\n%s\nand not\n%s", file, b.line, r.stdout, b.output)
	}
}

var exits = regexp.MustCompile(`# exits with (\d+)\n$`)

// exitCode returns the exit code that a block announces.
func exitCode(script string) int {
	if m := exits.FindStringSubmatch(script); m != nil {
		code, _ := strconv.Atoi(m[1]) // it is digits
		return code
	}
	return 0
}

// program runs a Go program against this host.
func (h *host) program(source string) result {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "main.go")
	if err := os.WriteFile(file, []byte(source), 0o644); err != nil {
		h.t.Fatal(err)
	}
	binary := filepath.Join(filepath.Dir(file), "main")
	build := exec.CommandContext(h.t.Context(), "go", "build", "-o", binary, file) // here, in this module
	if out, err := build.CombinedOutput(); err != nil {
		h.t.Fatalf("build: %v\n%s", err, out)
	}
	return h.shell(binary)
}

// changing is what differs from one run to the next, and what it becomes.
var changing = []struct {
	pattern *regexp.Regexp
	word    string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "UUID"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?( UTC|Z)`), "TIME"},
	{regexp.MustCompile(`\b[0-9a-f]{8}\b`), "ID"},
	{regexp.MustCompile(`\b\d+(\.\d+)?(µs|ms|s|m|h|d)\b`), "DURATION"},
	{regexp.MustCompile(`\bnow\b|\bDURATION ago\b`), "AGO"},
	{regexp.MustCompile(`\b\d+(\.\d+)? ([KMGTPE]i)?B\b`), "SIZE"},
	{regexp.MustCompile(`\bpid \d+`), "pid N"},
	{regexp.MustCompile(`#block\d+`), "#blockN"},
	{regexp.MustCompile(`QEMU \d+\.\d+\.\d+, \S+`), "QEMU VERSION"},
	{regexp.MustCompile(` +`), " "},
}

// normal returns the lines of an output without what differs between runs.
func normal(output string) []string {
	for _, c := range changing {
		output = c.pattern.ReplaceAllString(output, c.word)
	}
	return strings.Split(strings.TrimSpace(output), "\n")
}

// matches compares what is shown with what was printed. A line "…" stands for
// any lines.
func matches(shown, printed []string) bool {
	switch {
	case len(shown) == 0:
		return len(printed) == 0
	case shown[0] == "…":
		for i := range len(printed) + 1 {
			if matches(shown[1:], printed[i:]) {
				return true
			}
		}
		return false
	default:
		return len(printed) > 0 && shown[0] == printed[0] && matches(shown[1:], printed[1:])
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		shown, printed string
		want           bool
	}{
		{"web/a taken in 84ms", "web/a taken in 1.2s", true},
		{"web/a taken in 84ms", "web/b taken in 84ms", false},
		{"id c0ffee01, now", "id 00000000, 3s ago", true},
		{"a", "a\nb", false},
		{"a\n…", "a\nb\nc", true},
		{"…\nc", "a\nb\nc", true},
		{"…\nc", "a\nb", false},
		{"", "a", false},
	} {
		if got := matches(normal(c.shown), normal(c.printed)); got != c.want {
			t.Errorf("%q for %q: %v", c.printed, c.shown, got)
		}
	}
}

// TestSettings reads the configuration files that the documents show.
func TestSettings(t *testing.T) {
	proven := 0
	for _, file := range documents(t) {
		for _, b := range blocks(t, file) {
			if b.kind != "yaml" {
				continue
			}
			proven++
			t.Run(fmt.Sprintf("%s:%d", filepath.Base(file), b.line), func(t *testing.T) { readSettings(t, b.text) })
		}
	}
	if proven == 0 {
		t.Error("the documents show no configuration")
	}
}

func readSettings(t *testing.T, text string) {
	dir := t.TempDir()
	name, _, _ := strings.Cut(strings.TrimPrefix(text, "# "), "\n")
	path := filepath.Join(dir, filepath.Base(name))
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	switch {
	case name == "/etc/vmsnap/vmsnapd.yaml":
		// The one command that reads the settings and then has nothing to do.
		cmd := exec.Command(filepath.Join(binaries, "vmsnapd"), "thaw-all", "--config", path, "--state-dir", dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	case filepath.Dir(name) == "/etc/vmsnap/vms.d":
		overrides, err := discover.LoadOverrides(dir)
		if err != nil || len(overrides) == 0 {
			t.Errorf("%d overrides, %v", len(overrides), err)
		}
	default:
		t.Errorf("it is not known what reads %q", name)
	}
}
