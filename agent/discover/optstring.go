package discover

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// setting is one key of an option argument.
type setting struct{ key, value string }

// settings are the keys of one option argument in their order. Nested objects
// of a JSON argument have dotted keys, as QEMU's key=value syntax spells them.
type settings []setting

// get returns the value of a key, and whether it is there. The last of several
// decides, as in QEMU.
func (s settings) get(key string) (string, bool) {
	for i := len(s) - 1; i >= 0; i-- {
		if s[i].key == key {
			return s[i].value, true
		}
	}
	return "", false
}

func (s settings) value(key string) string {
	v, _ := s.get(key)
	return v
}

func (s settings) has(key string) bool {
	_, ok := s.get(key)
	return ok
}

// on reports whether a boolean key is true. A key that is absent, or holds
// something that QEMU would refuse, is false.
func (s settings) on(key string) bool {
	switch s.value(key) {
	case "on", "true", "yes", "y":
		return true
	}
	return false
}

// child returns the keys below a prefix, without it.
func (s settings) child(prefix string) settings {
	var out settings
	for _, kv := range s {
		if rest, ok := strings.CutPrefix(kv.key, prefix+"."); ok {
			out = append(out, setting{rest, kv.value})
		}
	}
	return out
}

// maxSettings bounds the keys of one option argument; few have thirty.
const maxSettings = 1 << 10

// parseSettings reads an option argument: JSON when it starts with a brace,
// else comma-separated key=value pairs in which a doubled comma stands for
// one. A first part without "=" is the value of the implied key; a later one
// is a flag, and "no" before it negates it (util/qemu-option.c).
func parseSettings(arg, implied string) (settings, error) {
	if strings.HasPrefix(arg, "{") {
		return parseJSONSettings(arg)
	}
	if n := strings.Count(arg, ","); n >= 2*maxSettings { // doubled ones count twice
		return nil, fmt.Errorf("argument with %d commas", n)
	}
	var out settings
	for first := true; arg != ""; first = false {
		key, flag := "", true
		if i := strings.IndexAny(arg, "=,"); i >= 0 && arg[i] == '=' {
			key, arg, flag = arg[:i], arg[i+1:], false
		}
		var value string
		value, arg = cutValue(arg)
		switch {
		case !flag:
		case first && implied != "":
			key = implied
		case strings.HasPrefix(value, "no"):
			key, value = value[2:], "off"
		default:
			key, value = value, "on"
		}
		out = append(out, setting{key, value})
	}
	return out, nil
}

// cutValue takes a value up to a single comma, with doubled commas undone, and
// returns what follows.
func cutValue(s string) (value, rest string) {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, ',')
		if i < 0 {
			b.WriteString(s)
			return b.String(), ""
		}
		b.WriteString(s[:i])
		if i+1 >= len(s) || s[i+1] != ',' {
			return b.String(), s[i+1:]
		}
		b.WriteByte(',')
		s = s[i+2:]
	}
}

func parseJSONSettings(arg string) (settings, error) {
	dec := json.NewDecoder(strings.NewReader(arg))
	dec.UseNumber()
	out, err := flattenObject(dec, "", 0)
	if err != nil {
		return nil, fmt.Errorf("json argument: %w", err)
	}
	if len(out) > maxSettings {
		return nil, fmt.Errorf("json argument: %d keys", len(out))
	}
	if dec.More() {
		return nil, fmt.Errorf("json argument: text after the object at byte %d", dec.InputOffset())
	}
	return out, nil
}

// maxJSONDepth bounds nested arguments; QEMU itself stops at 1024, and a block
// graph a few levels deep is all that is ever seen.
const maxJSONDepth = 64

// flattenObject reads one JSON value and returns its leaves under dotted keys,
// in the order in which they stand.
func flattenObject(dec *json.Decoder, prefix string, depth int) (settings, error) {
	if depth > maxJSONDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxJSONDepth)
	}
	tok, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch v := tok.(type) {
	case json.Delim:
		return flattenMembers(dec, v, prefix, depth)
	case bool:
		return settings{{prefix, map[bool]string{true: "on", false: "off"}[v]}}, nil
	case nil:
		return settings{{prefix, ""}}, nil
	default:
		return settings{{prefix, fmt.Sprint(v)}}, nil
	}
}

// flattenMembers reads the members of an object or array up to its end.
func flattenMembers(dec *json.Decoder, open json.Delim, prefix string, depth int) (settings, error) {
	var out settings
	for i := 0; dec.More(); i++ {
		key := strconv.Itoa(i)
		if open == '{' {
			tok, err := dec.Token()
			if err != nil {
				return nil, err
			}
			key = fmt.Sprint(tok)
		}
		if prefix != "" {
			key = prefix + "." + key
		}
		inner, err := flattenObject(dec, key, depth+1)
		if err != nil {
			return nil, err
		}
		out = append(out, inner...)
	}
	_, err := dec.Token()
	return out, err
}
