package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/op"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// table returns the rows of the table whose header begins with a word: the
// cells without the marks of code.
func table(t *testing.T, file, first string) [][]string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var rows [][]string
	inside := false
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.ReplaceAll(strings.TrimSpace(cells[i]), "`", "")
		}
		switch {
		case !strings.HasPrefix(line, "|"):
			inside = false
		case strings.HasPrefix(line, "|---"):
		case cells[0] == first && !inside:
			inside = true
		case inside:
			rows = append(rows, cells)
		}
	}
	if len(rows) == 0 {
		t.Fatalf("%s has no table of the header %q", file, first)
	}
	return rows
}

// column returns one column of a table, sorted.
func column(rows [][]string, i int) []string {
	var all []string
	for _, r := range rows {
		all = append(all, r[i])
	}
	return slices.Sorted(slices.Values(all))
}

// syntax calls f with every node of a package's files, tests left out.
func syntax(t *testing.T, dir string, f func(ast.Node)) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v, %v", dir, files, err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			if n != nil {
				f(n)
			}
			return true
		})
	}
}

// text returns the value of a string literal.
func text(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// name returns the last part of a qualified name.
func name(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

func kebab(s string) string { return strings.ReplaceAll(strings.ToLower(s), "_", "-") }

// connectCodes returns the Connect code of each error code, as the API's own
// table has them.
func connectCodes(t *testing.T) map[string]string {
	t.Helper()
	camel := regexp.MustCompile(`([a-z])([A-Z])`)
	codes := map[string]string{"unreachable": "unavailable"} // told by a daemon that stops, and by clients
	syntax(t, "../agent/rpc", func(n ast.Node) {
		form, ok := n.(*ast.KeyValueExpr)
		if !ok {
			return
		}
		value, ok := form.Value.(*ast.CompositeLit)
		if !ok || len(value.Elts) != 2 {
			return
		}
		short, isCode := strings.CutPrefix(name(value.Elts[0]), "Code")
		long, isError := strings.CutPrefix(name(value.Elts[1]), "ErrorCode_ERROR_CODE_")
		if isCode && isError {
			codes[kebab(long)] = strings.ToLower(camel.ReplaceAllString(short, "${1}_${2}"))
		}
	})
	return codes
}

func TestExitCodes(t *testing.T) {
	codes := connectCodes(t)
	want := map[string][]string{}
	for number, long := range vmsnapv1.ErrorCode_name {
		word := kebab(strings.TrimPrefix(long, "ERROR_CODE_"))
		if number == 0 {
			word = ""
		} else if codes[word] == "" {
			t.Errorf("no Connect code is known for %s", word)
		}
		want[strconv.Itoa(int(number))] = []string{word, codes[word]}
	}
	got := map[string][]string{}
	for _, row := range table(t, "exit-codes.md", "exit") {
		got[row[0]] = row[1:3]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("exit-codes.md and the API differ (-API +document):\n%s", diff)
	}
}

var warnName = regexp.MustCompile(`^[wW]arn[A-Z]`)

// warnings returns the codes of all warnings: the constants that begin with
// "warn", and what is given to a Warning as it stands.
func warnings(t *testing.T) []string {
	t.Helper()
	codes := map[string]bool{}
	find := func(n ast.Node) {
		switch n := n.(type) {
		case *ast.ValueSpec:
			if code, ok := constant(n); ok && warnName.MatchString(n.Names[0].Name) {
				codes[code] = true
			}
		case *ast.CompositeLit:
			if name(n.Type) != "Warning" {
				return
			}
			for _, e := range n.Elts {
				pair, keyed := e.(*ast.KeyValueExpr)
				if !keyed {
					t.Errorf("a Warning without names of its fields: the test cannot read its code")
				} else if code, ok := text(pair.Value); ok && name(pair.Key) == "Code" {
					codes[code] = true
				}
			}
		case *ast.CallExpr:
			if code, ok := firstText(n); ok && name(n.Fun) == "warn" {
				codes[code] = true
			}
		}
	}
	for _, dir := range append(packages(t, "../agent"), "../memdump") {
		syntax(t, dir, find)
	}
	return slices.Sorted(maps.Keys(codes))
}

func constant(n *ast.ValueSpec) (string, bool) {
	if len(n.Names) != 1 || len(n.Values) != 1 {
		return "", false
	}
	return text(n.Values[0])
}

func firstText(n *ast.CallExpr) (string, bool) {
	if len(n.Args) == 0 {
		return "", false
	}
	return text(n.Args[0])
}

// packages returns the directories of a package and those below it, test kits
// left out.
func packages(t *testing.T, root string) []string {
	t.Helper()
	var dirs []string
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() || strings.HasSuffix(path, "test") {
			return err
		}
		if files, err := filepath.Glob(filepath.Join(path, "*.go")); err != nil || len(files) > 0 {
			dirs = append(dirs, path)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func TestWarnings(t *testing.T) {
	if diff := cmp.Diff(warnings(t), column(table(t, "exit-codes.md", "warning"), 0)); diff != "" {
		t.Errorf("exit-codes.md and the code differ (-code +document):\n%s", diff)
	}
}

func TestProblems(t *testing.T) {
	codes := map[string]bool{}
	syntax(t, "../agent", func(n ast.Node) {
		lit, ok := n.(*ast.CompositeLit)
		if !ok || name(lit.Type) != "Problem" || len(lit.Elts) == 0 {
			return
		}
		first := lit.Elts[0]
		if pair, keyed := first.(*ast.KeyValueExpr); keyed {
			first = pair.Value
		}
		code, ok := text(first)
		if !ok {
			t.Errorf("a Problem whose code the test cannot read")
		}
		codes[code] = true
	})
	if diff := cmp.Diff(slices.Sorted(maps.Keys(codes)), column(table(t, "exit-codes.md", "problem"), 0)); diff != "" {
		t.Errorf("exit-codes.md and the code differ (-code +document):\n%s", diff)
	}
}

func TestFindings(t *testing.T) {
	codes := map[string]bool{}
	syntax(t, "../agent", func(n ast.Node) {
		switch n := n.(type) {
		case *ast.ValueSpec:
			if code, ok := constant(n); ok && strings.HasPrefix(n.Names[0].Name, "find") {
				codes[code] = true
			}
		case *ast.CompositeLit:
			if name(n.Type) != "Finding" {
				return
			}
			for _, e := range n.Elts {
				if pair, keyed := e.(*ast.KeyValueExpr); keyed && name(pair.Key) == "Code" {
					if code, ok := text(pair.Value); ok {
						codes[code] = true
					}
				}
			}
		}
	})
	if diff := cmp.Diff(slices.Sorted(maps.Keys(codes)), column(table(t, "doctor.md", "finding"), 0)); diff != "" {
		t.Errorf("doctor.md and the code differ (-code +document):\n%s", diff)
	}
}

// TestKindsAreListed compares the kinds of operations with the list of all of
// them, which the metrics begin with.
func TestKindsAreListed(t *testing.T) {
	var kinds []string
	syntax(t, "../agent/op", func(n ast.Node) {
		if spec, ok := n.(*ast.ValueSpec); ok && name(spec.Type) == "Kind" {
			if kind, ok := constant(spec); ok {
				kinds = append(kinds, kind)
			}
		}
	})
	var listed []string
	for _, k := range op.Kinds {
		listed = append(listed, string(k))
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values(kinds)), slices.Sorted(slices.Values(listed))); diff != "" {
		t.Errorf("op.Kinds is not complete (-kinds +listed):\n%s", diff)
	}
}

// TestHostChecks compares what is checked of a host, by the daemon and by the
// command, with the table.
func TestHostChecks(t *testing.T) {
	hostCode := regexp.MustCompile(`^host[A-Z]`)
	var codes []string
	for _, dir := range []string{"../agent", "../cmd/vmsnap"} {
		syntax(t, dir, func(n ast.Node) {
			if spec, ok := n.(*ast.ValueSpec); ok {
				if code, ok := constant(spec); ok && hostCode.MatchString(spec.Names[0].Name) {
					codes = append(codes, code)
				}
			}
		})
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values(codes)), column(table(t, "doctor.md", "check"), 0)); diff != "" {
		t.Errorf("doctor.md and the code differ (-code +document):\n%s", diff)
	}
}

func TestRoles(t *testing.T) {
	want, got := map[string]string{}, map[string]string{}
	procedure := regexp.MustCompile(`^(\w+Service)(\w+)Procedure$`)
	syntax(t, "../agent/rpc", func(n ast.Node) {
		if pair, ok := n.(*ast.KeyValueExpr); ok {
			need, ok := pair.Value.(*ast.CompositeLit)
			if m := procedure.FindStringSubmatch(name(pair.Key)); m != nil && ok && len(need.Elts) > 0 {
				want[m[1]+"/"+m[2]] = strings.ToLower(name(need.Elts[0]))
			}
		}
	})
	for _, row := range table(t, "security.md", "method") {
		for _, method := range strings.Split(row[0], ", ") {
			got[method] = row[1]
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("security.md and the code differ (-code +document):\n%s", diff)
	}
}

func TestMethods(t *testing.T) {
	want, got := map[string]string{}, map[string]string{}
	protoregistry.GlobalFiles.RangeFilesByPackage("vmsnap.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			want[string(s.Name())] = strings.Join(methods(s), ", ")
		}
		return true
	})
	for _, row := range table(t, "controller.md", "service") {
		got[row[0]] = row[1]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("controller.md and the API differ (-API +document):\n%s", diff)
	}
}

func methods(s protoreflect.ServiceDescriptor) []string {
	var names []string
	for i := range s.Methods().Len() {
		names = append(names, string(s.Methods().Get(i).Name()))
	}
	return names
}

func TestEventKinds(t *testing.T) {
	var want, got []string
	for _, k := range event.Kinds {
		want = append(want, string(k))
	}
	for _, row := range table(t, "events.md", "kind") {
		got = append(got, strings.Split(row[0], ", ")...)
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(got))); diff != "" {
		t.Errorf("events.md and the code differ (-code +document):\n%s", diff)
	}
}

// TestFlags compares the settings with the daemon's help.
func TestFlags(t *testing.T) {
	help, err := exec.Command(filepath.Join(binaries, "vmsnapd"), "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, m := range regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z-]+)`).FindAllStringSubmatch(string(help), -1) {
		if !slices.Contains([]string{"help", "version", "config"}, m[1]) {
			want = append(want, m[1])
		}
	}
	var got []string
	for _, row := range table(t, "settings.md", "setting") {
		got = append(got, strings.Split(row[0], ", ")...)
		if value := regexp.MustCompile(`^\S+$`).FindString(row[1]); value != "" && value != "false" && !strings.Contains(string(help), `(default "`+value+`")`) {
			t.Errorf("%s: the default %q is not in the help", row[0], value)
		}
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(got))); diff != "" {
		t.Errorf("settings.md and vmsnapd --help differ (-help +document):\n%s", diff)
	}
}
