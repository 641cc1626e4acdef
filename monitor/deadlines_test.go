package monitor

import (
	"maps"
	"slices"
	"testing"
	"time"
)

func TestEveryCommandHasADeadlineAndAReason(t *testing.T) {
	commands := slices.Collect(maps.Keys(limits))
	for _, command := range append(commands, "query-status", "x-query-numa", "quit") {
		l := limitOf(command)
		if l.after < time.Second || l.after > 2*time.Minute || l.reason == "" {
			t.Errorf("%s: %+v", command, l)
		}
	}
}

func TestOnlyQuestionsAreQuestions(t *testing.T) {
	for command, want := range map[string]bool{
		"query-status":            true,
		"query-named-block-nodes": true,
		"x-query-numa":            true,
		"qom-get":                 true,
		"qom-list":                true,
		"qmp_capabilities":        true,
		"qom-set":                 false,
		"stop":                    false,
		"transaction":             false,
		"getfd":                   false,
		"human-monitor-command":   false,
		"something-new":           false,
	} {
		if got := limitOf(command).query; got != want {
			t.Errorf("%s: asks only: %v, want %v", command, got, want)
		}
	}
}
