package discover

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
	"go.yaml.in/yaml/v3"
)

// maxOverrideFile bounds one file in bytes. An override has a dozen lines.
const maxOverrideFile = 1 << 20

// SettingError is a mistake in an override file.
type SettingError struct {
	File    string
	Line    int    // 0 when the whole file is meant
	Setting string // dotted; "" when none can be named
	Err     error
}

// Error says where the mistake is, and what.
func (e *SettingError) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	if e.Setting != "" {
		fmt.Fprintf(&b, ": %s", e.Setting)
	}
	fmt.Fprintf(&b, ": %v", e.Err)
	return b.String()
}

// Unwrap returns the cause.
func (e *SettingError) Unwrap() error { return e.Err }

// LoadOverrides reads the *.yaml files of a directory, in the order of their
// names; each holds one or more documents, one for each VM. A directory that
// does not exist holds none. All mistakes of all files are returned together,
// as joined SettingErrors, and no overrides with them.
//
//	match:                      # which VM; all that is given must fit
//	  name: web                 # -name
//	  uuid: 7f3a…               # -uuid
//	  pid-file: /run/web.pid    # holds its pid, or is its -pidfile
//	  command-line: disk=web    # part of its command line
//	name: web-1                 # what to call it
//	qmp: [/run/web/qmp.sock]    # instead of what was found
//	guest-agent: /run/web/qga.sock
//	unit: qemu@web.service
//	overlay-dir: /srv/overlays  # where its overlays are made
//	disks:
//	  data: {overlay-dir: /srv/big}
//	ignore: true                # leave it alone
func LoadOverrides(dir string) ([]Override, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("overrides: %w", err)
	}
	var out []Override
	var errs []error
	for _, entry := range entries {
		if entry.IsDir() || filepath.Ext(entry.Name()) != ".yaml" {
			continue
		}
		overrides, err := loadFile(filepath.Join(dir, entry.Name()))
		out = append(out, overrides...)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return out, nil
}

func loadFile(file string) ([]Override, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("overrides: %w", err)
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxOverrideFile+1))
	if err != nil {
		return nil, fmt.Errorf("overrides: %w", err)
	}
	if len(data) > maxOverrideFile {
		return nil, &SettingError{File: file, Err: fmt.Errorf("longer than %d bytes", maxOverrideFile)}
	}
	return parseOverrides(file, data)
}

// parseOverrides reads the documents of one file.
func parseOverrides(file string, data []byte) ([]Override, error) {
	var out []Override
	var errs []error
	for dec := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return out, errors.Join(errs...)
		}
		if err != nil { // the rest of the file cannot be made sense of
			return nil, errors.Join(append(errs, &SettingError{File: file, Err: err})...)
		}
		if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
			continue
		}
		d := document{file: file}
		o := d.override(doc.Content[0])
		out = append(out, o)
		errs = append(errs, d.errs...)
	}
}

// document reads one document and collects its mistakes. The nodes are read
// one by one, so that each mistake is told with its own line.
type document struct {
	file string
	errs []error
}

func (d *document) fail(n *yaml.Node, setting, format string, args ...any) {
	d.errs = append(d.errs, &SettingError{d.file, n.Line, setting, fmt.Errorf(format, args...)})
}

func (d *document) override(n *yaml.Node) Override {
	o := Override{File: d.file, Line: n.Line}
	d.mapping(n, "", map[string]func(string, *yaml.Node){
		"match": func(at string, n *yaml.Node) {
			d.mapping(n, at, map[string]func(string, *yaml.Node){
				"name":         d.text(&o.Match.Name),
				"uuid":         d.uuid(&o.Match.UUID),
				"pid-file":     d.path(&o.Match.PIDFile),
				"command-line": d.text(&o.Match.CommandLine),
			})
		},
		"name":        d.text(&o.Name),
		"qmp":         d.sockets(&o.QMP),
		"guest-agent": d.socket(&o.GuestAgent),
		"unit":        d.text(&o.Unit),
		"ignore":      d.flag(&o.Ignore),
		"overlay-dir": d.path(&o.OverlayDir),
		"disks":       d.disks(&o.Disks),
	})
	if o.Match == (Match{}) && len(d.errs) == 0 {
		d.fail(n, "match", "missing: name the VM by name, uuid, pid-file or command-line")
	}
	return o
}

// mapping hands each setting to its reader.
func (d *document) mapping(n *yaml.Node, prefix string, readers map[string]func(string, *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		d.fail(n, prefix, "must be settings with values")
		return
	}
	d.entries(n, prefix, func(at string, key, value *yaml.Node) {
		if read, known := readers[key.Value]; known {
			read(at, value)
		} else {
			d.fail(key, at, "unknown setting")
		}
	})
}

// entries hands each entry of a mapping to its reader, once.
func (d *document) entries(n *yaml.Node, prefix string, read func(at string, key, value *yaml.Node)) {
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := strings.TrimPrefix(prefix+"."+key.Value, ".")
		if seen[key.Value] {
			d.fail(key, at, "given twice")
			continue
		}
		seen[key.Value] = true
		read(at, key, value)
	}
}

// disks reads settings of single disks, by their devices.
func (d *document) disks(to *map[string]string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
			d.fail(n, at, "must be disks with settings")
			return
		}
		*to = map[string]string{}
		d.entries(n, at, func(at string, key, value *yaml.Node) {
			var dir string
			d.mapping(value, at, map[string]func(string, *yaml.Node){"overlay-dir": d.path(&dir)})
			(*to)[key.Value] = dir
		})
	}
}

// text reads a string that is not empty.
func (d *document) text(to *string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
			d.fail(n, at, "must be a text")
			return
		}
		*to = n.Value
	}
}

func (d *document) uuid(to *string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		id, err := uuid.Parse(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			d.fail(n, at, "must be a UUID")
			return
		}
		*to = id.String()
	}
}

func (d *document) path(to *string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || !filepath.IsAbs(n.Value) {
			d.fail(n, at, "must be an absolute path")
			return
		}
		*to = filepath.Clean(n.Value)
	}
}

func (d *document) socket(to *string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if n.Kind == yaml.ScalarNode && len(n.Value) > 1 && n.Value[0] == '@' {
			*to = n.Value
			return
		}
		d.path(to)(at, n)
	}
}

func (d *document) sockets(to *[]string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		items := n.Content
		if n.Kind == yaml.ScalarNode {
			items = []*yaml.Node{n}
		}
		if len(items) == 0 || n.Kind == yaml.MappingNode {
			d.fail(n, at, "must be a path or a list of paths")
			return
		}
		for _, item := range items {
			var path string
			d.socket(&path)(at, item)
			*to = append(*to, path)
		}
	}
}

func (d *document) flag(to *bool) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || n.Decode(to) != nil {
			d.fail(n, at, "must be true or false")
		}
	}
}
