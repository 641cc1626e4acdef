package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for line, want := range map[string]string{
		"":                                   "no -agent",
		"-agent a":                           "NAME=SOCKET",
		"-agent a=/s":                        "no -round",
		"-agent a=/s -round r x":             "one argument too many",
		"-agent a=/s -round r -vms [":        "-vms [",
		"-agent a=/s -round r -quiesce some": "-quiesce some",
		"-agent a=/s -agent b=/t -round r":   "",
	} {
		var stderr bytes.Buffer
		s, err := parse(strings.Fields(line), &stderr)
		switch {
		case want == "" && (err != nil || len(s.agents) != 2 || s.agents[1] != agent{"b", "/t"}):
			t.Errorf("%q: %+v, %v", line, s, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%q: %v; want %q", line, err, want)
		}
	}
}
