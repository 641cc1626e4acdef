package metrics

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const (
	rulesFile     = "../packaging/prometheus/vmsnap.rules.yml"
	casesFile     = "../packaging/prometheus/vmsnap.rules.test.yml"
	dashboardFile = "../packaging/grafana/vmsnap.json"
)

// rules is a file of Prometheus' rules.
type rules struct {
	Groups []struct {
		Name  string `yaml:"name"`
		Rules []rule `yaml:"rules"`
	} `yaml:"groups"`
}

type rule struct {
	Record string `yaml:"record,omitempty"`
	Alert  string `yaml:"alert,omitempty"`
	Expr   string `yaml:"expr"`
}

// readYAML reads a file into v.
func readYAML(t *testing.T, file string, v any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, v); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

func readRules(t *testing.T) []rule {
	t.Helper()
	var r rules
	readYAML(t, rulesFile, &r)
	var all []rule
	for _, g := range r.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatalf("%s has no rules", rulesFile)
	}
	return all
}

func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestRules(t *testing.T) {
	promtool(t, "check", "rules", rulesFile)
	promtool(t, "test", "rules", casesFile)
}

// TestRulesHaveCases has each alert fire in a case, and not fire in another.
func TestRulesHaveCases(t *testing.T) {
	var cases struct {
		Tests []struct {
			Alerts []struct {
				Name    string `yaml:"alertname"`
				Expects []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
			Series []struct {
				Series string `yaml:"series"`
			} `yaml:"input_series"`
		} `yaml:"tests"`
	}
	readYAML(t, casesFile, &cases)
	fires, rests := map[string]bool{}, map[string]bool{}
	for _, c := range cases.Tests {
		healthy := 0
		for _, s := range c.Series {
			if strings.Contains(s.Series, `instance="h2"`) {
				healthy++
			}
		}
		for _, a := range c.Alerts {
			fires[a.Name] = fires[a.Name] || len(a.Expects) > 0
			rests[a.Name] = rests[a.Name] || healthy > 0 && len(a.Expects) < 2
		}
	}
	for _, r := range readRules(t) {
		if r.Alert != "" && (!fires[r.Alert] || !rests[r.Alert]) {
			t.Errorf("%s: a case in which it fires: %v, in which it does not: %v", r.Alert, fires[r.Alert], rests[r.Alert])
		}
	}
}

var (
	strayText  = regexp.MustCompile(`"[^"]*"`)
	metricName = regexp.MustCompile(`\b(?:vmsnap|process)[_:][\w:]+`)
)

// existing are the names that expressions may use: what the daemon tells, and
// what the rules record.
func existing(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for line := range strings.Lines(scrape(t, busy())) {
		if !strings.HasPrefix(line, "#") {
			name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
			name, _, _ = strings.Cut(name, "{")
			names[name] = true
		}
	}
	for _, r := range readRules(t) {
		if r.Record != "" {
			names[r.Record] = true
		}
	}
	return names
}

func TestRulesUseWhatExists(t *testing.T) {
	names := existing(t)
	for _, r := range readRules(t) {
		for _, name := range metricName.FindAllString(strayText.ReplaceAllString(r.Expr, ""), -1) {
			if !names[name] {
				t.Errorf("%s%s uses %s, which nobody tells", r.Alert, r.Record, name)
			}
		}
	}
}

// TestDashboard checks the expressions of the dashboard, by their names and by
// promtool.
func TestDashboard(t *testing.T) {
	data, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int    `json:"id"`
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	names, ids := existing(t), map[int]bool{}
	var wrapped strings.Builder
	wrapped.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		for i, target := range p.Targets {
			for _, name := range metricName.FindAllString(strayText.ReplaceAllString(target.Expr, ""), -1) {
				if !names[name] {
					t.Errorf("%s uses %s, which nobody tells", p.Title, name)
				}
			}
			expr := strings.ReplaceAll(target.Expr, "$__rate_interval", "5m")
			fmt.Fprintf(&wrapped, "      - {record: 'panel:%d:%d', expr: '%s'}\n", p.ID, i, strings.ReplaceAll(expr, "'", "''"))
		}
	}
	file := filepath.Join(t.TempDir(), "dashboard.yml")
	if err := os.WriteFile(file, []byte(wrapped.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}
