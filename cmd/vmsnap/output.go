package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// format is how a result is printed. It is a flag's value.
type format string

const (
	formatTable format = "table"
	formatWide  format = "wide"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
	formatName  format = "name"
)

func formats() []string {
	return []string{string(formatTable), string(formatWide), string(formatJSON), string(formatYAML), string(formatName)}
}

// Set takes a format's name.
func (f *format) Set(s string) error {
	if !slices.Contains(formats(), s) {
		return fmt.Errorf("%q is none of %s", s, strings.Join(formats(), ", "))
	}
	*f = format(s)
	return nil
}

// String returns the format's name.
func (f *format) String() string { return string(*f) }

// Type returns what the help shows for the value.
func (f *format) Type() string { return "format" }

// result is what a command found or did, in each form it can be printed in.
type result struct {
	document any                    // json and yaml: what plain takes
	names    []string               // name: one a line
	human    func(page, bool) error // table and wide
}

// print prints a result to the standard output.
func (a *app) print(r result) error {
	var out bytes.Buffer
	if err := a.render(&out, r); err != nil {
		return err
	}
	if _, err := a.stdout.Write(out.Bytes()); err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	return nil
}

func (a *app) render(out *bytes.Buffer, r result) error {
	switch a.format {
	case formatJSON:
		text, err := encode(r.document)
		out.Write(text)
		return err
	case formatYAML:
		text, err := encode(r.document)
		if err != nil {
			return err
		}
		return asYAML(out, text)
	case formatName:
		for _, name := range r.names {
			_, _ = fmt.Fprintln(out, printable(name))
		}
		return nil
	default:
		return r.human(page{out: out, header: !a.noHeader, now: a.now()}, a.format == formatWide)
	}
}

// asYAML writes a JSON document as YAML. JSON is YAML already, only in another
// style, so that both have one shape and one order.
func asYAML(w io.Writer, document []byte) error {
	var node yaml.Node
	if err := yaml.Unmarshal(document, &node); err != nil {
		return fmt.Errorf("print as YAML: %w", err)
	}
	restyle(&node)
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(&node); err != nil {
		return fmt.Errorf("print as YAML: %w", err)
	}
	return enc.Close()
}

// oldBools are truth values to a reader of YAML 1.1, unless they are quoted.
var oldBools = map[string]bool{"y": true, "n": true, "yes": true, "no": true, "on": true, "off": true}

func restyle(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode || !oldBools[strings.ToLower(n.Value)] {
		n.Style = 0
	}
	for _, child := range n.Content {
		restyle(child)
	}
}
