package qga

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestCleanText(t *testing.T) {
	tests := []struct{ in, want string }{
		{"ext4", "ext4"},
		{"Größe", "Größe"},
		{"a\x00b\nc", "a\ufffdb\ufffdc"},
		{"0123456789abcdef", "0123456789abcdef"},
		{"0123456789abcdefg", "0123456789abc…"},
		{"\xff\xff\xff\xff\xff\xff\xff\xff", "\ufffd\ufffd\ufffd\ufffd…"},
		{"0123456789abcdö…", "0123456789abc…"},
	}
	for _, test := range tests {
		if got := cleanText(test.in, 16); got != test.want || len(got) > 16 {
			t.Errorf("cleanText(%q) = %q of %d bytes, want %q", test.in, got, len(got), test.want)
		}
	}
}

// What a guest says without being asked is thrown away before the next command.
func TestUnaskedTalk(t *testing.T) {
	ours, theirs := net.Pipe()
	c := New(ours, Limits{})
	defer func() { _ = errors.Join(c.Close(), theirs.Close()) }()
	served := make(chan string, 8)
	go func() {
		lines := bufio.NewScanner(theirs)
		for lines.Scan() {
			var request struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if err := json.Unmarshal(bytes.TrimPrefix(lines.Bytes(), []byte{delimiter}), &request); err != nil {
				return
			}
			served <- request.Execute
			reply := "{\"return\":\"frozen\"}\n"
			if request.Execute == cmdSync {
				reply = fmt.Sprintf("\xff{\"return\":%d}\n", request.Arguments.ID)
				if len(served) == 1 { // in one piece with the answer
					reply += "{\"return\":\"thawed\"}\n"
				}
			}
			if _, err := io.WriteString(theirs, reply); err != nil {
				return
			}
		}
	}()
	if err := c.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	state, err := c.FreezeStatus(t.Context())
	if err != nil || state != Frozen {
		t.Errorf("state %s, error %v, want the answer and not the talk before it", state, err)
	}
	for _, want := range []string{cmdSync, cmdSync, cmdStatus} {
		if got := <-served; got != want {
			t.Errorf("served %s, want %s", got, want)
		}
	}
}

// FuzzDecode gives a client whatever a guest may send in answer to each
// command. It must not panic, hang, or hand on text that is not clean.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"return":{}}`, `{"return":2}`, `{"return":-1}`, `{"return":"frozen"}`, `{"return":[]}`, `{"return":null}`,
		`{"return":[{"name":"vda1","mountpoint":"/","type":"ext4","disk":[{"serial":"a"}]}]}`,
		`{"return":{"version":"7.2.0","supported_commands":[{"name":"guest-ping","enabled":true,"success-response":true}]}}`,
		`{"return":{"id":"debian","kernel-release":"6.1.0"}}`,
		`{"error":{"class":"GenericError","desc":"no"}}`, `{"error":{}}`, `{"error":1}`,
		"{\"return\":\"\xff\xfe\"}", `{"return":"\ud800"}`, `[[[[[[[[[[`, `"\`, "\n\n\n", "\xff", strings.Repeat("x", 5000),
	} {
		f.Add([]byte(seed))
	}
	lim := Limits{ReplyBytes: 4096, DiscardBytes: 8192, Depth: 8, Items: 16, TextBytes: 64}
	f.Fuzz(func(t *testing.T, reply []byte) {
		calls := map[string]func(*Client, context.Context) ([]string, error){
			"ping": func(c *Client, ctx context.Context) ([]string, error) { return nil, c.Ping(ctx) },
			"status": func(c *Client, ctx context.Context) ([]string, error) {
				s, err := c.FreezeStatus(ctx)
				return []string{string(s)}, err
			},
			"info": func(c *Client, ctx context.Context) ([]string, error) {
				info, err := c.Info(ctx)
				texts := []string{info.Version}
				for name := range info.Commands {
					texts = append(texts, name)
				}
				return texts, err
			},
			"osinfo": func(c *Client, ctx context.Context) ([]string, error) {
				o, err := c.OSInfo(ctx)
				return []string{o.ID, o.Name, o.PrettyName, o.Version, o.VersionID, o.KernelRelease, o.KernelVersion, o.Machine}, err
			},
			"filesystems": func(c *Client, ctx context.Context) ([]string, error) {
				list, err := c.Filesystems(ctx)
				var texts []string
				for _, fs := range list {
					texts = append(texts, fs.Name, fs.Mountpoint, fs.Type)
				}
				return texts, err
			},
			"thaw": func(c *Client, ctx context.Context) ([]string, error) {
				n, err := c.Thaw(ctx)
				if n < 0 || n > mostFilesystems {
					t.Errorf("count %d", n)
				}
				return nil, err
			},
		}
		for name, call := range calls {
			c := New(&replay{Reader: bytes.NewReader(reply)}, lim)
			c.inStep = true
			texts, err := call(c, t.Context())
			var refused *CommandError
			if errors.As(err, &refused) {
				texts = append(texts, refused.Class, refused.Desc)
			} else if err != nil && c.inStep {
				t.Errorf("%s: in step after %v", name, err)
			}
			for _, text := range texts {
				if len(text) > lim.TextBytes || !utf8.ValidString(text) || strings.ContainsFunc(text, unprintable) {
					t.Errorf("%s: text %q", name, text)
				}
			}
		}
		c := New(&replay{Reader: bytes.NewReader(reply)}, lim)
		if err := c.Sync(t.Context()); err == nil {
			t.Error("in step by an answer that could not know the id")
		}
	})
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// replay is a connection on which everything has been said already.
type replay struct{ io.Reader }

func (*replay) Write(b []byte) (int, error)      { return len(b), nil }
func (*replay) Close() error                     { return nil }
func (*replay) LocalAddr() net.Addr              { return nil }
func (*replay) RemoteAddr() net.Addr             { return nil }
func (*replay) SetDeadline(time.Time) error      { return nil }
func (*replay) SetReadDeadline(time.Time) error  { return nil }
func (*replay) SetWriteDeadline(time.Time) error { return nil }
