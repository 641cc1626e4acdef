package main

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/vmsnap/vmsnap/agent"
)

// profiles are the snapshots' options by name. Only a file has them.
type profiles map[string]agent.Profile

// profileName is what a profile may be called: it stands on command lines and in
// files.
var profileName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$`)

// read takes the profiles in, and tells all their mistakes with their lines.
func (p *profiles) read(path string, node *yaml.Node) error {
	if node.Kind != yaml.MappingNode {
		return mistake(path, node, "profiles: must be names with options")
	}
	all := profiles{}
	var errs []error
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		if _, twice := all[key.Value]; twice {
			errs = append(errs, mistake(path, key, "profiles: %s: given twice", key.Value))
			continue
		}
		if !profileName.MatchString(key.Value) {
			errs = append(errs, mistake(path, key, "profiles: %q: a name has letters, digits, _ . -, and begins with a letter or a digit", key.Value))
			continue
		}
		profile, err := readProfile(path, key, value)
		all[key.Value] = profile
		errs = append(errs, err)
	}
	*p = all
	return errors.Join(errs...)
}

func mistake(path string, at *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("configuration: %s:%d: %w", path, at.Line, fmt.Errorf(format, args...))
}

// readProfile reads one profile.
func readProfile(path string, name, node *yaml.Node) (agent.Profile, error) {
	var p agent.Profile
	if node.Kind != yaml.MappingNode {
		return p, mistake(path, name, "profiles: %s: must be options with values", name.Value)
	}
	err := readOptions(path, name.Value, node, profileOptions(&p))
	if err != nil {
		return p, err
	}
	if err := p.Check(); err != nil {
		return p, mistake(path, name, "profiles: %s: %w", name.Value, err)
	}
	return p, nil
}

// option reads the value of an option.
type option func(*yaml.Node) error

// readOptions reads options by their names.
func readOptions(path, where string, node *yaml.Node, options map[string]option) error {
	var errs []error
	seen := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		read := options[key.Value]
		switch {
		case read == nil:
			errs = append(errs, mistake(path, key, "profiles: %s: %s: unknown option; known are %s", where, key.Value,
				strings.Join(slices.Sorted(maps.Keys(options)), ", ")))
		case seen[key.Value]:
			errs = append(errs, mistake(path, key, "profiles: %s: %s: given twice", where, key.Value))
		default:
			if err := read(value); err != nil {
				errs = append(errs, mistake(path, key, "profiles: %s: %s: %w", where, key.Value, err))
			}
		}
		seen[key.Value] = true
	}
	return errors.Join(errs...)
}

// profileOptions are the options of a profile, called as the flags of vmsnap.
func profileOptions(p *agent.Profile) map[string]option {
	return map[string]option{
		"disks": patterns(&p.Disks), "exclude": patterns(&p.Exclude), "description": plain(&p.Description), "labels": plain(&p.Labels),
		"quiesce":     word(&p.Quiesce, agent.QuiescePrefer, agent.QuiesceRequire, agent.QuiesceNone),
		"mountpoints": plain(&p.Mountpoints), "freeze-timeout": duration(&p.FreezeTimeout), "lease": duration(&p.Lease),
		"strict": plain(&p.Strict), "allow-partial": plain(&p.AllowPartial), "memory": plain(&p.Memory),
		"memory-strategy": word(&p.Strategy, agent.MemoryBackground, agent.MemoryPrecopy, agent.MemoryStopped),
		"max-pause":       duration(&p.MaxPause), "compress": plain(&p.Compress),
		"hooks": func(n *yaml.Node) error {
			var dir string
			if n.Decode(&dir) != nil || dir != "none" && !filepath.IsAbs(dir) {
				return errors.New("must be none or the absolute path of a directory")
			}
			if dir == "none" {
				dir = ""
			}
			p.Hooks = &dir
			return nil
		},
		"keep-last": plain(&p.Retention.Last), "keep-hourly": plain(&p.Retention.Hourly), "keep-daily": plain(&p.Retention.Daily),
		"keep-weekly": plain(&p.Retention.Weekly), "keep-monthly": plain(&p.Retention.Monthly), "keep-yearly": plain(&p.Retention.Yearly),
		"max-age": duration(&p.Retention.MaxAge), "max-space": size(&p.Retention.MaxSpace),
	}
}

// plain reads what YAML has a type for.
func plain[T any](to *T) option {
	return func(n *yaml.Node) error {
		if n.Tag == "!!null" || n.Decode(to) != nil {
			return fmt.Errorf("must be %s", wanted(to))
		}
		return nil
	}
}

// patterns reads a pattern or several.
func patterns(to *[]string) option {
	return func(n *yaml.Node) error {
		if n.Kind == yaml.ScalarNode && n.Tag == "!!str" {
			*to = []string{n.Value}
		} else if err := plain(to)(n); err != nil {
			return errors.New("must be a pattern of disks, or a list of them")
		}
		for _, p := range *to {
			if _, err := filepath.Match(p, ""); err != nil || p == "" {
				return fmt.Errorf("%q is not a pattern", p)
			}
		}
		return nil
	}
}

// word reads one of some words.
func word[T ~string](to *T, words ...T) option {
	return func(n *yaml.Node) error {
		if n.Decode(to) != nil || !slices.Contains(words, *to) {
			return fmt.Errorf("%q is none of %v", n.Value, words)
		}
		return nil
	}
}

// duration reads a time of more than nothing: 30s, 12h, 30d or 4w.
func duration(to *time.Duration) option {
	return func(n *yaml.Node) error {
		text, hours := n.Value, time.Duration(0)
		for unit, h := range map[string]time.Duration{"d": 24, "w": 7 * 24} {
			if number, ok := strings.CutSuffix(text, unit); ok {
				text, hours = number, h
			}
		}
		d, err := time.ParseDuration(text)
		if hours > 0 {
			var n uint64
			n, err = strconv.ParseUint(text, 10, 14)
			d = time.Duration(n) * hours * time.Hour
		}
		if err != nil || d <= 0 {
			return fmt.Errorf("%q is not a time of more than 0, such as 30s, 12h or 30d", n.Value)
		}
		*to = d
		return nil
	}
}

// size reads bytes, with a unit of 1024s perhaps.
func size(to *uint64) option {
	return func(n *yaml.Node) error {
		digits := strings.TrimRight(n.Value, "KMGTPiB")
		number, err := strconv.ParseUint(digits, 10, 64)
		shift, known := map[string]int{"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "PiB": 50}[n.Value[len(digits):]]
		if err != nil || !known || number == 0 || number > 1<<(63-shift) {
			return fmt.Errorf("%q is not a size such as 100GiB", n.Value)
		}
		*to = number << shift
		return nil
	}
}
