package qga

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// decodeReply takes a reply apart: what the command returned, or a CommandError
// without its command.
func decodeReply(line []byte, lim Limits) (json.RawMessage, error) {
	if err := checkDepth(line, lim.Depth); err != nil {
		return nil, err
	}
	var reply map[string]json.RawMessage
	if err := json.Unmarshal(line, &reply); err != nil {
		return nil, malformed(err)
	}
	returned, succeeded := reply["return"]
	failure, failed := reply["error"]
	switch {
	case succeeded == failed:
		return nil, fmt.Errorf("%w: neither a result nor an error", ErrMalformed)
	case succeeded:
		return returned, nil
	}
	var e *struct{ Class, Desc string }
	if err := json.Unmarshal(failure, &e); err != nil {
		return nil, malformed(err)
	}
	if e == nil {
		return nil, fmt.Errorf("%w: an empty error", ErrMalformed)
	}
	return nil, &CommandError{Class: cleanText(e.Class, lim.TextBytes), Desc: cleanText(e.Desc, lim.TextBytes)}
}

// checkDepth refuses deep nesting before anything recursive sees it. It does
// not check the syntax.
func checkDepth(b []byte, limit int) error {
	depth, inText, escaped := 0, false, false
	for _, c := range b {
		switch {
		case escaped:
			escaped = false
		case inText:
			escaped = c == '\\'
			inText = c != '"'
		case c == '"':
			inText = true
		case c == '{' || c == '[':
			if depth++; depth > limit {
				return fmt.Errorf("%w: more than %d levels", ErrTooDeep, limit)
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// decodeInto decodes a result that is one object or text.
func decodeInto(raw json.RawMessage, result any) error {
	if err := json.Unmarshal(raw, result); err != nil {
		return malformed(err)
	}
	return nil
}

func decodeInt(raw json.RawMessage) (int64, error) {
	var n *int64
	if err := json.Unmarshal(raw, &n); err != nil {
		return 0, malformed(err)
	}
	if n == nil {
		return 0, fmt.Errorf("%w: no number", ErrMalformed)
	}
	return *n, nil
}

// mostFilesystems is more than any guest freezes.
const mostFilesystems = 1 << 16

// decodeCount returns a count of file systems, clamped to what is possible.
func decodeCount(raw json.RawMessage) (int, error) {
	n, err := decodeInt(raw)
	return int(min(max(n, 0), mostFilesystems)), err
}

// decodeList decodes a list element by element, so that a short text cannot
// become a large list in memory.
func decodeList[T any](raw json.RawMessage, lim Limits) ([]T, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	if open, err := d.Token(); err != nil || open != json.Delim('[') {
		return nil, fmt.Errorf("%w: no list", ErrMalformed)
	}
	var list []T
	for d.More() {
		if len(list) == lim.Items {
			return nil, fmt.Errorf("%w: a list of more than %d", ErrTooLarge, lim.Items)
		}
		var item T
		if err := d.Decode(&item); err != nil {
			return nil, malformed(err)
		}
		list = append(list, item)
	}
	return list, nil
}

// malformed leaves out the cause's own text where it would quote the guest.
func malformed(err error) error {
	return fmt.Errorf("%w: %s", ErrMalformed, cleanText(err.Error(), 200))
}

// cleanText makes a text of the guest fit for logs and terminals: valid UTF-8
// without control or direction characters, and at most limit bytes long.
func cleanText(s string, limit int) string {
	const ellipsis = "…"
	cut := len(s) > limit
	if cut {
		s = s[:limit] // a rune cut in two becomes a replacement character below
	}
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
	// Replacing may have made it longer.
	for len(s) > limit || cut && len(s)+len(ellipsis) > limit && s != "" {
		cut = true
		_, last := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-last]
	}
	if cut {
		s += ellipsis
	}
	return s
}
