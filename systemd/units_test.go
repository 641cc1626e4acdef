package systemd

import (
	"strings"
	"testing"
)

func TestQuoteCommand(t *testing.T) {
	got := QuoteCommand([]string{"/usr/bin/q$x", `a "b" \c`, "$HOME %n", "x\ny", ""})
	if want := `"/usr/bin/q$x" "a \"b\" \\c" "$$HOME %%n" "x\x0ay" ""`; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

func TestDropInDir(t *testing.T) {
	if dir, err := dropInDir("qemu@web.service"); err != nil || !strings.HasSuffix(dir, "/qemu@web.service.d") {
		t.Error(dir, err)
	}
	for _, bad := range []string{"", "a/b.service", "../x.service", ".", "..", "x"} {
		if dir, err := dropInDir(bad); err == nil {
			t.Errorf("%q: %s", bad, dir)
		}
	}
}
