package monitor

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"testing"
)

// FuzzFindReply puts a reply behind bytes that begin anywhere, and checks that
// it is found if what comes before it ends with a newline, and never anything
// else.
func FuzzFindReply(f *testing.F) {
	f.Add([]byte(`e": "query-x"}], "id": 1}`+"\r\n"), []byte{0}, false)
	f.Add([]byte("        }\r\n    ]\r\n}\r\n{\r\n    \"event\": \"STOP\"\r\n}\r\n"), []byte{3, 1}, true)
	f.Add([]byte("{\"a\":1}\r\n{\n}\n{{\n"), []byte{9}, false)
	f.Add([]byte(`}`+"\r\n"+`{"id": "other"}`+"\r\n"), []byte{255}, true)
	f.Add([]byte{}, []byte{1}, false)
	f.Add(bytes.Repeat([]byte("x"), 6000), []byte{200}, false)
	f.Fuzz(func(t *testing.T, before, sizes []byte, pretty bool) {
		const limit, id, rest = 5000, `"0123456789abcdef01234567"`, `{"event": "NEXT"}`
		if bytes.Contains(before, []byte(id[1:len(id)-1])) {
			return // nobody guesses it
		}
		reply := "{\"return\": {\"a\": [1]}, \"id\": " + id + "}\r\n"
		if pretty {
			reply = "{\r\n    \"return\": {\r\n        \"a\": [\r\n            1\r\n        ]\r\n    },\r\n    \"id\": " + id + "\r\n}\r\n"
		}
		stream := append(bytes.Clone(before), reply+rest...)
		r := bufio.NewReader(&chunks{data: stream, sizes: sizes})
		m, err := findReply(r, id, limit)
		lines := len(before) == 0 || before[len(before)-1] == '\n'
		switch {
		case errors.Is(err, ErrTooLarge):
			if len(stream) <= limit {
				t.Fatalf("%d bytes are too many", len(stream))
			}
		case err != nil && lines:
			t.Fatalf("not found: %v", err)
		case err != nil:
			if !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		case string(m.ID) != id || len(m.Return) == 0:
			t.Fatalf("found %+v", m)
		default:
			next, err := newDecoder(r, limit).next()
			if err != nil || string(next) != rest {
				t.Fatalf("then comes %q, %v", next, err)
			}
		}
	})
}
