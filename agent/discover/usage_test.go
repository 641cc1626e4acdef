package discover

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReadUsage(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"io.stat": "8:0 rbytes=90112 wbytes=10 rios=3 wios=1 dbytes=7 dios=7\n253:0\n8:16 rbytes=8 wbytes=5 rios=1 wios=2\n",
		// Kernels before 5.13 have no line "full" for the CPU.
		"cpu.pressure":    "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n",
		"memory.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=250\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=100\n",
		"io.pressure":     "nothing of the kind\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := &Usage{
		IO: &IOUsage{ReadBytes: 90120, WriteBytes: 15, Reads: 4, Writes: 3},
		Pressure: []Pressure{
			{Resource: "cpu", Some: 1500 * time.Millisecond},
			{Resource: "memory", Some: 250 * time.Microsecond, Full: 100 * time.Microsecond},
		},
	}
	if diff := cmp.Diff(want, readUsage(dir)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(new(Usage), readUsage(t.TempDir())); diff != "" {
		t.Errorf("of nothing (-want +got):\n%s", diff)
	}
}

func TestParsePressureIsBounded(t *testing.T) {
	for _, text := range []string{"some total=-1\n", "some total=9223372036854775807\n", "some total=1e3\n", strings.Repeat("x", 2<<20)} {
		if p, ok := parsePressure(strings.NewReader(text)); ok {
			t.Errorf("%.40q: %v", text, p)
		}
	}
}
