package docs_test

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	link    = regexp.MustCompile(`\]\(([^)]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fenced  = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	dropped = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
)

// anchors returns what the headings of a document can be linked by.
func anchors(document string) []string {
	var all []string
	for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(document, ""), -1) {
		all = append(all, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return all
}

func TestLinks(t *testing.T) {
	for _, file := range documents(t) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(fenced.ReplaceAllString(string(data), ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			path, anchor, anchored := strings.Cut(m[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			there, err := os.ReadFile(target)
			if err != nil {
				t.Errorf("%s: %s: %v", file, m[1], err)
			} else if anchored && !slices.Contains(anchors(string(there)), anchor) {
				t.Errorf("%s: %s: there is no such heading", file, m[1])
			}
		}
	}
}

// TestEveryDocumentIsListed looks for each document in the README.
func TestEveryDocumentIsListed(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range documents(t) {
		path, err := filepath.Rel("..", filepath.Join(".", file))
		if err != nil {
			path = "docs/" + file
		}
		if path != "README.md" && !bytes.Contains(readme, []byte("]("+path+")")) {
			t.Errorf("README.md does not link to %s", path)
		}
	}
}

const module = "github.com/vmsnap/vmsnap/"

// TestDrawing compares the drawing of the packages with their imports. Test
// kits and tests are not drawn, and what a drawn package has below it belongs
// to it unless it is drawn itself.
func TestDrawing(t *testing.T) {
	data, err := os.ReadFile("architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	labels, drawn := map[string]string{}, map[string]bool{}
	for _, m := range regexp.MustCompile(`(\w+)\["([\w/]+)"\]`).FindAllStringSubmatch(string(data), -1) {
		labels[m[1]] = m[2]
	}
	for _, m := range regexp.MustCompile(`(?m)^  (\w+)(?:\[.*?\])? --> (\w+)`).FindAllStringSubmatch(string(data), -1) {
		drawn[labels[m[1]]+" imports "+labels[m[2]]] = true
	}
	list := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...")
	list.Dir = ".."
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	real := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		from := node(words[0], labels)
		if from == "" {
			continue
		}
		for _, imported := range words[1:] {
			if to := node(imported, labels); to != "" && to != from {
				real[from+" imports "+to] = true
			}
		}
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(real)), slices.Sorted(maps.Keys(drawn))); diff != "" {
		t.Errorf("architecture.md's drawing is not true (-imports +drawing):\n%s", diff)
	}
}

// node returns the node of the drawing that a package belongs to; one that has
// none is a node of its own. It returns "" for what is not drawn.
func node(path string, labels map[string]string) string {
	path, ours := strings.CutPrefix(path, module)
	if !ours || strings.HasSuffix(path, "test") || strings.HasPrefix(path, "internal/") || path == "docs" || path == "bench" {
		return ""
	}
	for p := path; p != "."; p = filepath.Dir(p) {
		for _, label := range labels {
			if label == p {
				return p
			}
		}
	}
	return path
}
