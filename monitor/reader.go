package monitor

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
)

const (
	// smallBuffer is what an idle session keeps for reading. Most replies and
	// all events fit.
	smallBuffer = 4 << 10

	// DefaultReplyLimit bounds one message of QEMU, in bytes. The graph of long
	// chains on many disks is a few megabytes.
	DefaultReplyLimit = 64 << 20

	// maxDepth is the nesting that QEMU's own JSON parser accepts (MAX_NESTING
	// in qobject/json-parser.c); its replies are far flatter.
	maxDepth = 1024

	excerptLen = 64
)

// A decoder cuts a byte stream into JSON objects by their braces, since a
// monitor may be set to spread an object over lines (-qmp-pretty). It does not
// judge what is inside them.
type decoder struct {
	r     io.Reader
	limit int

	buf        []byte // len(buf) is all of it that may be used
	start, end int    // received and not yet returned: buf[start:end]
	scanned    int    // of these, as far as the state below has looked

	depth    int
	inString bool
	escaped  bool
}

func newDecoder(r io.Reader, limit int) *decoder {
	return &decoder{r: r, limit: limit, buf: make([]byte, smallBuffer)}
}

// next returns the next object, which stays valid until the following call.
// At the end of the stream it returns io.EOF, inside an object
// io.ErrUnexpectedEOF.
func (d *decoder) next() ([]byte, error) {
	for {
		if obj, err := d.scan(); obj != nil || err != nil {
			return obj, err
		}
		d.room()
		n, err := d.r.Read(d.buf[d.end:])
		d.end += n
		switch {
		case n > 0:
			// An error that comes with data will come again.
		case errors.Is(err, io.EOF) && d.depth > 0:
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		}
	}
}

// scan looks through what it has not seen for the end of an object.
func (d *decoder) scan() ([]byte, error) {
	for ; d.scanned < d.end; d.scanned++ {
		c := d.buf[d.scanned]
		if d.depth > 0 && d.scanned-d.start == d.limit {
			return nil, ErrTooLarge
		}
		switch {
		case d.inString:
			d.scanString(c)
		case d.depth == 0:
			switch c {
			case ' ', '\t', '\r', '\n':
				d.start = d.scanned + 1
			case '{':
				d.depth = 1
			default:
				return nil, d.garbage("bytes between objects", d.buf[d.scanned:d.end])
			}
		case c == '"':
			d.inString = true
		case c == '{', c == '[':
			if d.depth++; d.depth > maxDepth {
				return nil, d.garbage("nested too deep", d.buf[d.start:d.end])
			}
		case c == '}', c == ']':
			if d.depth--; d.depth == 0 {
				d.scanned++
				obj := d.buf[d.start:d.scanned]
				d.start = d.scanned
				return obj, nil
			}
		}
	}
	return nil, nil
}

func (d *decoder) scanString(c byte) {
	switch {
	case d.escaped:
		d.escaped = false
	case c == '\\':
		d.escaped = true
	case c == '"':
		d.inString = false
	}
}

func (d *decoder) garbage(reason string, seen []byte) error {
	return &ProtocolError{Reason: reason, Excerpt: excerpt(seen)}
}

// room makes space to read into: it moves the unfinished object to the front,
// gives a large buffer back once what is left fits a small one, and grows a
// full one.
func (d *decoder) room() {
	left := d.buf[d.start:d.end]
	switch {
	case len(d.buf) > smallBuffer && len(left) <= smallBuffer/2:
		d.move(make([]byte, smallBuffer), left)
	case len(left) == len(d.buf):
		// The first byte over the limit is enough to know that it was passed.
		d.move(make([]byte, min(2*len(d.buf), max(d.limit, smallBuffer)+1)), left)
	case d.start > 0 && d.end == len(d.buf), len(left) == 0:
		d.move(d.buf, left)
	}
}

func (d *decoder) move(to, left []byte) {
	copy(to, left)
	d.scanned -= d.start
	d.buf, d.start, d.end = to, 0, len(left)
}

// message is whatever QEMU sends: a greeting, an event or a reply. Decoding
// copies, so that a message outlives the decoder's buffer.
type message struct {
	QMP *struct {
		Version json.RawMessage
	}

	Event     string
	Timestamp struct {
		Seconds, Microseconds int64
	}
	Data json.RawMessage

	ID     json.RawMessage
	Return json.RawMessage
	Error  *struct {
		Class, Desc string
	}
}

// nextMessage decodes the next object of the stream.
func (d *decoder) nextMessage() (*message, error) {
	obj, err := d.next()
	if err != nil {
		return nil, err
	}
	m := new(message)
	if err := json.Unmarshal(obj, m); err != nil {
		return nil, &ProtocolError{Reason: err.Error(), Excerpt: excerpt(obj)}
	}
	return m, nil
}

func excerpt(b []byte) []byte {
	return bytes.Clone(b[:min(len(b), excerptLen)])
}
