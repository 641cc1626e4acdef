package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// TestExaminePreview has previews that were opened lately and long ago, with and
// without the memory that their undo needs.
func TestExaminePreview(t *testing.T) {
	dir := t.TempDir()
	memory := func(name string, size int) *catalog.PreviewFormer {
		path := filepath.Join(dir, name)
		if size > 0 {
			if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return &catalog.PreviewFormer{Ran: true, Memory: &catalog.SavedMemory{Path: path, Size: 100}}
	}
	lately, long := time.Now().Add(-time.Hour), time.Now().Add(-26*time.Hour)
	for name, c := range map[string]struct {
		preview *catalog.Preview
		found   []string // codes
		says    string
	}{
		"none":           {nil, nil, ""},
		"lately":         {&catalog.Preview{Opened: lately, Former: &catalog.PreviewFormer{}}, nil, ""},
		"with memory":    {&catalog.Preview{Opened: lately, Former: memory("whole", 100)}, nil, ""},
		"forgotten":      {&catalog.Preview{Opened: long}, []string{"preview-forgotten"}, "preview of monday for 26h"},
		"memory is gone": {&catalog.Preview{Opened: lately, Former: memory("gone", 0)}, []string{"memory-missing"}, "cannot be undone"},
		"memory is torn": {&catalog.Preview{Opened: lately, Former: memory("torn", 99)}, []string{"memory-altered"}, "99 bytes instead of 100"},
	} {
		t.Run(name, func(t *testing.T) {
			a := shelf(t, "web")
			if p := c.preview; p != nil {
				p.VMID, p.Snapshot = "web", "monday"
				rec := a.vms["web"].rec
				rec.Identity = "name:web"
				if err := a.catalog.Update(t.Context(), func(tx *catalog.Tx) error {
					if _, err := tx.UpsertVM(t.Context(), rec); err != nil {
						return err
					}
					return tx.PutPreview(t.Context(), *p)
				}); err != nil {
					t.Fatal(err)
				}
			}
			x := &examination{Agent: a, vm: a.vms["web"]}
			if err := x.lookAtPreview(t.Context()); err != nil {
				t.Fatal(err)
			}
			var codes, says []string
			for _, f := range x.findings {
				codes, says = append(codes, f.Code), append(says, f.Message)
				if f.Hint == "" || f.Repairable {
					t.Errorf("%+v", f)
				}
			}
			if !slices.Equal(codes, c.found) || !strings.Contains(strings.Join(says, "\n"), c.says) {
				t.Errorf("found %v: %v", codes, says)
			}
		})
	}
}
