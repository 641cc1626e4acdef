package memdump

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const someMappings = `55e4c43dc000-55e4c4450000 rw-p 00000000 00:00 0                          [heap]
Rss:                 412 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me ac 
7f43d3e00000-7f43f3e00000 rw-p 00000000 00:00 0 
Size:             524288 kB
Rss:              102400 kB
AnonHugePages:     53248 kB
ShmemPmdMapped:        0 kB
VmFlags: rd wr mr mw me uw dc ac hg mg 
7f4408000000-7f4447fff000 rwxp 00000000 00:00 0 
AnonHugePages:     55296 kB
VmFlags: rd wr ex mr mw me ac hg 
7f5408000000-7f5448000000 rw-s 00000000 00:01 1033                       /memfd:a b\0127f00-7f01 rw-p (deleted)
AnonHugePages:         0 kB
ShmemPmdMapped:     4096 kB
VmFlags: rd wr sh mr mw me ms sd 
`

func TestParseMappings(t *testing.T) {
	want := []mapping{
		{start: 0x55e4c43dc000, end: 0x55e4c4450000, perms: "rw-p", path: "[heap]", flags: []string{"rd", "wr", "mr", "mw", "me", "ac"}},
		{start: 0x7f43d3e00000, end: 0x7f43f3e00000, perms: "rw-p", huge: 53248 << 10, flags: []string{"rd", "wr", "mr", "mw", "me", "uw", "dc", "ac", "hg", "mg"}},
		{start: 0x7f4408000000, end: 0x7f4447fff000, perms: "rwxp", huge: 55296 << 10, flags: []string{"rd", "wr", "ex", "mr", "mw", "me", "ac", "hg"}},
		{
			start: 0x7f5408000000, end: 0x7f5448000000, perms: "rw-s", path: `/memfd:a b\0127f00-7f01 rw-p (deleted)`, huge: 4096 << 10,
			flags: []string{"rd", "wr", "sh", "mr", "mw", "me", "ms", "sd"},
		},
	}
	got, err := parseMappings(strings.NewReader(someMappings))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(mapping{})); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if sum := protectedBytes(got); sum != 512<<20 {
		t.Errorf("%d bytes protected", sum)
	}
	for i, ram := range []bool{false, true, false, true} {
		if mayBeRAM(got[i]) != ram {
			t.Errorf("may %x be guest memory: %t", got[i].start, !ram)
		}
	}
}

func TestParseMappingsRefuses(t *testing.T) {
	for _, s := range []string{"Rss: 1 kB\n", "VmFlags: uw\n", "8-4 rw-p 0 00:00 0\n", "4-8 rw-p\n", "10000000000000000-20000000000000000 rw-p 0 00:00 0"} {
		if got, err := parseMappings(strings.NewReader(s)); err == nil {
			t.Errorf("%q: %+v", s, got)
		}
	}
}

// What the kernel writes about this process is understood.
func TestOwnMappings(t *testing.T) {
	all, err := mappings(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	var stack int
	for _, m := range all {
		if len(m.flags) == 0 {
			t.Errorf("no flags: %+v", m)
		}
		if m.path == "[stack]" {
			stack++
		}
	}
	if stack != 1 {
		t.Errorf("%d stacks in %+v", stack, all)
	}
}

func FuzzParseMappings(f *testing.F) {
	f.Add(someMappings)
	f.Add("4-8 rw-p 0 00:00 0\nVmFlags:\nAnonHugePages: 18014398509481984 kB\n")
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseMappings(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, m := range all {
			if m.end <= m.start {
				t.Errorf("%+v", m)
			}
		}
	})
}
