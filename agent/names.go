package agent

import (
	"crypto/rand"
	"encoding/hex"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// newID returns eight random hexadecimal digits.
func newID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// The limits of what users may choose.
const (
	maxName        = 100
	maxDescription = 4096
	maxLabels      = 64
	maxLabel       = 256
)

// generatedName names a snapshot that was given no name.
func generatedName(now time.Time, operation string) string {
	return now.UTC().Format("20060102-150405") + "-" + operation[:4]
}

// checkName refuses snapshot names that could not be typed or shown. Names
// never become part of a path, but VM/NAME has to be readable.
func checkName(name string) error {
	switch {
	case name == "":
		return fault.New(fault.Usage, "the snapshot's name is empty")
	case len(name) > maxName:
		return fault.New(fault.Usage, "the snapshot's name is %d bytes long; at most %d are taken", len(name), maxName)
	case !utf8.ValidString(name):
		return fault.New(fault.Usage, "the snapshot's name %q is not UTF-8", name)
	case strings.HasPrefix(name, "-"):
		return fault.New(fault.Usage, "the snapshot's name %q begins with a dash", name)
	}
	for _, c := range name {
		if c == '/' || unicode.IsSpace(c) || !unicode.IsPrint(c) {
			return fault.New(fault.Usage, "the snapshot's name %q contains %q", name, c).
				WithHint("use letters, digits and marks such as - _ .")
		}
	}
	return nil
}

func checkTexts(description string, labels map[string]string) error {
	if len(description) > maxDescription || !utf8.ValidString(description) {
		return fault.New(fault.Usage, "the description is not UTF-8 of at most %d bytes", maxDescription)
	}
	if len(labels) > maxLabels {
		return fault.New(fault.Usage, "%d labels are given; at most %d are taken", len(labels), maxLabels)
	}
	for k, v := range labels {
		if k == "" || len(k) > maxLabel || len(v) > maxLabel || !utf8.ValidString(k+v) || strings.ContainsFunc(k+v, unicode.IsControl) {
			return fault.New(fault.Usage, "label %q=%q: a key and a value of at most %d printable bytes are needed", k, v, maxLabel)
		}
	}
	return nil
}
