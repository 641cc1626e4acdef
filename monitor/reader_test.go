package monitor

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// chunks reads its data in pieces of the given sizes, over and over.
type chunks struct {
	data  []byte
	sizes []byte
	next  int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.data) == 0 {
		return 0, io.EOF
	}
	n := len(c.data)
	if len(c.sizes) > 0 {
		n = int(c.sizes[c.next%len(c.sizes)]) + 1
		c.next++
	}
	n = copy(p[:min(n, len(p))], c.data)
	c.data = c.data[n:]
	return n, nil
}

// objects reads all objects of a stream and the error that ended it.
func objects(r io.Reader, limit int) ([]string, error) {
	d := newDecoder(r, limit)
	var out []string
	for {
		obj, err := d.next()
		if err != nil {
			return out, err
		}
		out = append(out, string(obj))
	}
}

func TestDecoderCutsObjects(t *testing.T) {
	big := `{"return":"` + strings.Repeat("ab", 40000) + `"}`
	tests := map[string]struct {
		in   string
		want []string
		err  error
	}{
		"empty":           {"", nil, io.EOF},
		"one":             {"{\"return\":{}}\r\n", []string{`{"return":{}}`}, io.EOF},
		"several a read":  {`{"a":1}` + "\r\n" + `{"b":[{}]}{"c":2}`, []string{`{"a":1}`, `{"b":[{}]}`, `{"c":2}`}, io.EOF},
		"pretty":          {"{\n    \"a\": {\n    }\n}\n", []string{"{\n    \"a\": {\n    }\n}"}, io.EOF},
		"braces in text":  {`{"a":"}{\"}\\"}{}`, []string{`{"a":"}{\"}\\"}`, `{}`}, io.EOF},
		"escaped unicode": {`{"a":"\u007d\ud83d\ude00😀"}`, []string{`{"a":"\u007d\ud83d\ude00😀"}`}, io.EOF},
		"cut":             {`{"a":1}{"b":`, []string{`{"a":1}`}, io.ErrUnexpectedEOF},
		"large, small":    {big + `{"a":1}` + big, []string{big, `{"a":1}`, big}, io.EOF},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			for kind, r := range map[string]io.Reader{
				"whole":    strings.NewReader(tt.in),
				"bytes":    iotest.OneByteReader(strings.NewReader(tt.in)),
				"halves":   iotest.HalfReader(strings.NewReader(tt.in)),
				"eof data": iotest.DataErrReader(strings.NewReader(tt.in)),
			} {
				got, err := objects(r, 1<<20)
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("%s: (-want +got)\n%s", kind, diff)
				}
				if !errors.Is(err, tt.err) {
					t.Errorf("%s: error %v, want %v", kind, err, tt.err)
				}
			}
		})
	}
}

func TestDecoderSplitAtEveryPoint(t *testing.T) {
	in := `{"event":"X","data":{"s":"a\"}\\","u":"\u005c"}}` + "\r\n" + ` {"return":[{},[1,"]"]],"id":"w.1"}` + "\n"
	want, _ := objects(strings.NewReader(in), 1<<10)
	if len(want) != 2 {
		t.Fatalf("objects: %q", want)
	}
	for i := range len(in) {
		got, err := objects(io.MultiReader(strings.NewReader(in[:i]), strings.NewReader(in[i:])), 1<<10)
		if diff := cmp.Diff(want, got); diff != "" || !errors.Is(err, io.EOF) {
			t.Errorf("split at %d: %v (-want +got)\n%s", i, err, diff)
		}
	}
}

func TestDecoderRefuses(t *testing.T) {
	tests := map[string]struct {
		in     string
		limit  int
		tooBig bool
		reason string
	}{
		"telnet":        {"\xff\xfd{}", 100, false, "between objects"},
		"an array":      {"[1]", 100, false, "between objects"},
		"a prompt":      {"QEMU 7.2.22 monitor - type 'help'\r\n(qemu) ", 100, false, "between objects"},
		"deep":          {strings.Repeat(`{"a":`, maxDepth+1), 1 << 20, false, "too deep"},
		"over limit":    {`{"a":"` + strings.Repeat("x", 100) + `"}`, 100, true, ""},
		"one over":      {`{"a":"123"}`, 10, true, ""},
		"never ends":    {`{"a":"` + strings.Repeat("x", 1<<20), 9000, true, ""},
		"all opening":   {strings.Repeat("{", 1000), 100, true, ""},
		"after a reply": {`{"return":{}} nonsense`, 100, false, "between objects"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := objects(strings.NewReader(tt.in), tt.limit)
			var pe *ProtocolError
			switch {
			case tt.tooBig && !errors.Is(err, ErrTooLarge):
				t.Errorf("error %v, want ErrTooLarge", err)
			case !tt.tooBig && (!errors.As(err, &pe) || !strings.Contains(pe.Reason, tt.reason)):
				t.Errorf("error %v, want a ProtocolError about %q", err, tt.reason)
			case pe != nil && len(pe.Excerpt) > excerptLen:
				t.Errorf("excerpt of %d bytes", len(pe.Excerpt))
			}
		})
	}
}

func TestDecoderAtTheLimit(t *testing.T) {
	in := `{"a":"123"}`
	got, err := objects(strings.NewReader(in+in), len(in))
	if diff := cmp.Diff([]string{in, in}, got); diff != "" || !errors.Is(err, io.EOF) {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

func TestDecoderGivesBackALargeBuffer(t *testing.T) {
	pr, pw := io.Pipe()
	d := newDecoder(pr, 1<<20)
	sizes := make(chan int)
	go func() {
		defer close(sizes)
		for {
			if _, err := d.next(); err != nil {
				return
			}
			sizes <- len(d.buf)
		}
	}()
	send := func(s string) int {
		if _, err := io.WriteString(pw, s); err != nil {
			t.Fatal(err)
		}
		return <-sizes
	}
	if n := send(`{"return":"` + strings.Repeat("x", 500<<10) + `"}`); n < 500<<10 {
		t.Errorf("a reply of 500 KiB in a buffer of %d", n)
	}
	if n := send(`{"return":{}}`); n != smallBuffer {
		t.Errorf("after a large reply the buffer has %d bytes, want %d", n, smallBuffer)
	}
	_ = pw.Close()
	<-sizes
}

// FuzzReader checks that the objects cut from a stream do not depend on how it
// arrives, and are those that encoding/json finds.
func FuzzReader(f *testing.F) {
	f.Add([]byte("{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22}}, \"capabilities\": [\"oob\"]}}\r\n"), []byte{0})
	f.Add([]byte(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}`+"\r\n"+`{"return": {}, "id": "a.1"}`), []byte{3, 1})
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "a \"b\" \\"}, "id": 1}[`), []byte{7})
	f.Add([]byte(`{"a":"`+strings.Repeat("x", 6000)+`"}{}`), []byte{200, 0})
	f.Add([]byte(strings.Repeat("{[", 600)), []byte{255})
	f.Fuzz(func(t *testing.T, data, sizes []byte) {
		const limit = 5000
		whole, wholeErr := objects(bytes.NewReader(data), limit)
		split, splitErr := objects(&chunks{data: data, sizes: sizes}, limit)
		if !slices.Equal(whole, split) {
			t.Fatalf("the split changes the objects: %q, %q", whole, split)
		}
		if kind(wholeErr) != kind(splitErr) {
			t.Fatalf("the split changes the error: %v, %v", wholeErr, splitErr)
		}
		ref := json.NewDecoder(bytes.NewReader(data))
		for _, obj := range whole {
			if len(obj) > limit {
				t.Fatalf("object of %d bytes", len(obj))
			}
			var want json.RawMessage
			if ref.Decode(&want) != nil {
				break // not JSON inside: the braces decide, and the message is refused later
			}
			if string(want) != obj {
				t.Fatalf("object %q, encoding/json has %q", obj, want)
			}
		}
		d := newDecoder(&chunks{data: data, sizes: sizes}, limit)
		for {
			if _, err := d.nextMessage(); err != nil {
				break
			}
		}
	})
}

// kind names an error without what depends on the amount received.
func kind(err error) string {
	var pe *ProtocolError
	if errors.As(err, &pe) {
		return pe.Reason
	}
	return err.Error()
}
