package monitortest_test

import (
	"bufio"
	"io"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// client speaks to the server without any package's help.
type client struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func connect(t *testing.T, srv *monitortest.Server) *client {
	t.Helper()
	conn, err := net.Dial("unix", srv.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &client{t, conn, bufio.NewReader(conn)}
}

// want reads one line.
func (c *client) want(want string) {
	c.t.Helper()
	got, err := c.r.ReadString('\n')
	if err != nil {
		c.t.Fatalf("%q, %v; want %q", got, err, want)
	}
	if diff := cmp.Diff(want+"\r\n", got); diff != "" {
		c.t.Errorf("(-want +got)\n%s", diff)
	}
}

func (c *client) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.conn, s); err != nil {
		c.t.Fatal(err)
	}
}

const greeting = `{"QMP":{"capabilities":["oob"],"version":{"package":"Debian 1:7.2+dfsg-7+deb12u18+b3","qemu":{"major":7,"micro":22,"minor":2}}}}`

func TestServerSpeaksAsQEMU(t *testing.T) {
	srv := monitortest.NewServer(t, monitortest.WithVersion(monitortest.QEMU72))
	srv.HandleReturn("stop", nil)
	c := connect(t, srv)
	c.want(greeting)
	srv.Emit("EARLY", nil) // dropped
	for _, step := range []struct{ send, want string }{
		{`{"execute":"stop","id":1}`, `{"id":1,"error":{"class":"CommandNotFound","desc":"Expecting capabilities negotiation with 'qmp_capabilities'"}}`},
		{`{"execute":"qmp_capabilities"}`, `{"return":{}}`},
		{`{"execute":"qmp_capabilities"}`, `{"error":{"class":"CommandNotFound","desc":"Capabilities negotiation is already complete, command ignored"}}`},
		{`{"execute":"stop","id":"x"}`, `{"return":{},"id":"x"}`},
		{`{"execute":"no"}`, `{"error":{"class":"CommandNotFound","desc":"The command no has not been found"}}`},
		{`{"execute"`, `{"error":{"class":"GenericError","desc":"JSON parse error, unexpected end of JSON input"}}`},
	} {
		c.send(step.send + "\n")
		c.want(step.want)
	}
	want := []string{"stop", "qmp_capabilities", "qmp_capabilities", "stop", "no"}
	if diff := cmp.Diff(want, srv.Commands()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestServerReadsHoweverCommandsArrive(t *testing.T) {
	srv := monitortest.NewServer(t)
	srv.HandleReturn("qmp_capabilities", 1)
	srv.Handle("a", func(r monitortest.Request) monitortest.Reply {
		return monitortest.Return(r.Arguments).AfterEvents(monitortest.Event{Name: "E"})
	})
	c := connect(t, srv)
	if _, err := c.r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	for _, b := range []byte(`{"execute":"qmp_capabilities"}` + "\n") {
		c.send(string(b))
	}
	c.want(`{"return":1}`)
	c.send(`{"execute":"a","arguments":{"n":1},"id":1}` + "\n" + `{"execute":"a","arguments":{"n":2},"id":2}` + "\n" + `{"execute":"a",`)
	for _, want := range []string{`{"return":{"n":1},"id":1}`, `{"return":{"n":2},"id":2}`} {
		if _, err := c.r.ReadString('\n'); err != nil { // the event
			t.Fatal(err)
		}
		c.want(want)
	}
	c.send(`"arguments":{"n":3}}` + "\n")
	if _, err := c.r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	c.want(`{"return":{"n":3}}`)
}

func TestServerServesOneAfterTheOther(t *testing.T) {
	srv := monitortest.NewServer(t, monitortest.WithVersion(monitortest.QEMU72))
	first, second := connect(t, srv), connect(t, srv)
	first.want(greeting)
	srv.HangUp()
	if _, err := first.r.ReadByte(); err != io.EOF {
		t.Errorf("the first is still served: %v", err)
	}
	second.want(greeting)
	srv.AwaitClient(2)
}
