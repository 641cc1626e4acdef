package launch

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
)

// argument is the argument of one option, to be changed key by key. One that is
// not changed is printed as it was given.
type argument struct {
	text    string
	parts   []part
	json    map[string]any // instead of parts
	changed bool
}

// part is one key of an argument with commas.
type part struct {
	key, value string
	bare       bool // a value, or a flag, without a key
}

// readArgument reads an argument: JSON when it begins with a brace, else parts
// between single commas (util/qemu-option.c). implied is the key of a first part
// that has none.
func readArgument(text, implied string) argument {
	a := argument{text: text}
	if strings.HasPrefix(text, "{") {
		dec := json.NewDecoder(strings.NewReader(text))
		dec.UseNumber()
		if dec.Decode(&a.json) == nil {
			return a
		}
		a.json = nil
	}
	for first := true; text != ""; first = false {
		p := part{bare: true}
		if i := strings.IndexAny(text, "=,"); i >= 0 && text[i] == '=' {
			p.key, text, p.bare = text[:i], text[i+1:], false
		}
		p.value, text = cutPart(text)
		if first && p.bare && implied != "" {
			p.key = implied
		}
		a.parts = append(a.parts, p)
	}
	return a
}

// cutPart takes what stands before a single comma, with doubled ones undone.
func cutPart(s string) (value, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != ',' {
			b.WriteByte(s[i])
			continue
		}
		if i+1 >= len(s) || s[i+1] != ',' {
			return b.String(), s[i+1:]
		}
		b.WriteByte(',')
		i++
	}
	return b.String(), ""
}

// String is the argument as QEMU reads it.
func (a *argument) String() string {
	if !a.changed {
		return a.text
	}
	if a.json != nil {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(a.json) // it was decoded
		return strings.TrimSuffix(b.String(), "\n")
	}
	out := make([]string, len(a.parts))
	for i, p := range a.parts {
		out[i] = strings.ReplaceAll(p.value, ",", ",,")
		if !p.bare {
			out[i] = p.key + "=" + out[i]
		}
	}
	return strings.Join(out, ",")
}

// object returns the object that holds a dotted key, and the key's last part.
func (a *argument) object(key string) (map[string]any, string) {
	at := a.json
	for {
		if _, ok := at[key]; ok {
			return at, key
		}
		first, rest, dotted := strings.Cut(key, ".")
		next, is := at[first].(map[string]any)
		if !dotted || !is {
			return at, key
		}
		at, key = next, rest
	}
}

// get returns the value of a key, the last if there are several, and whether it is
// there. Flags are "on", and "off" after "no".
func (a *argument) get(key string) (string, bool) {
	if a.json != nil {
		o, last := a.object(key)
		switch v := o[last].(type) {
		case string:
			return v, true
		case json.Number:
			return v.String(), true
		case bool:
			return map[bool]string{true: "on", false: "off"}[v], true
		}
		return "", false
	}
	for i, p := range slices.Backward(a.parts) {
		switch {
		case p.key == key && (!p.bare || i == 0):
			return p.value, true
		case p.bare && p.key == "" && p.value == key:
			return "on", true
		case p.bare && p.key == "" && p.value == "no"+key:
			return "off", true
		}
	}
	return "", false
}

func (a *argument) value(key string) string {
	v, _ := a.get(key)
	return v
}

// on reports whether a key is true.
func (a *argument) on(key string) bool {
	return slices.Contains([]string{"on", "true", "yes", "y"}, a.value(key))
}

// set gives a key a value, in place of all that it has.
func (a *argument) set(key, value string) {
	a.changed = true
	if a.json != nil {
		o, last := a.object(key)
		o[last] = value
		return
	}
	done := false
	a.parts = slices.DeleteFunc(a.parts, func(p part) bool {
		if p.key != key {
			return false
		}
		again := done
		done = true
		return again
	})
	for i, p := range a.parts {
		if p.key == key {
			a.parts[i].value = value
			return
		}
	}
	a.parts = append(a.parts, part{key: key, value: value})
}

// each calls f with the key and the value of every part that has both, and gives
// it the value that f returns. Members of nested objects have dotted keys.
func (a *argument) each(f func(key, value string) string) {
	if a.json != nil {
		eachMember(a.json, "", func(key, value string) string {
			now := f(key, value)
			a.changed = a.changed || now != value
			return now
		})
		return
	}
	for i, p := range a.parts {
		if p.key == "" {
			continue
		}
		if now := f(p.key, p.value); now != p.value {
			a.parts[i].value, a.changed = now, true
		}
	}
}

func eachMember(value any, prefix string, f func(key, value string) string) any {
	switch v := value.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for key := range v {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		for _, key := range keys {
			v[key] = eachMember(v[key], strings.TrimPrefix(prefix+"."+key, "."), f)
		}
	case []any:
		for i := range v {
			v[i] = eachMember(v[i], prefix, f)
		}
	case string:
		return f(prefix, v)
	case json.Number:
		if now := f(prefix, v.String()); now != v.String() {
			return now
		}
	}
	return value
}
