package qga

import (
	"bytes"
	"net"
	"testing"
)

// maxPingAllocs is what a command costs at least: its JSON, its context, and the
// watch on that.
const maxPingAllocs = 40

// guest plays a guest agent that returns the same each time, without allocating.
func guest(t testing.TB, value string) *Client {
	client, agent := net.Pipe()
	c := New(client, DefaultLimits)
	c.inStep = true // what is measured comes after the first command
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		defer func() { _ = agent.Close() }()
		in, reply := make([]byte, 4096), []byte(`{"return": `+value+"}\n")
		for {
			n, err := agent.Read(in)
			if err != nil {
				return
			}
			if bytes.IndexByte(in[:n], '\n') < 0 {
				continue // the command's begin
			}
			if _, err := agent.Write(reply); err != nil {
				return
			}
		}
	}()
	return c
}

// TestAllocations holds the line on what a command costs.
func TestAllocations(t *testing.T) {
	c := guest(t, "{}")
	n := testing.AllocsPerRun(100, func() {
		if err := c.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if n > maxPingAllocs {
		t.Errorf("a command allocates %g times, over %d", n, maxPingAllocs)
	}
}

func BenchmarkPing(b *testing.B) {
	c := guest(b, "{}")
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Ping(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFilesystems reads a list as a guest of some size has it.
func BenchmarkFilesystems(b *testing.B) {
	var list bytes.Buffer
	list.WriteString("[")
	for i := range 40 {
		if i > 0 {
			list.WriteString(", ")
		}
		list.WriteString(`{"name": "vda1", "mountpoint": "/srv/data", "type": "ext4", "used-bytes": 123456789, "total-bytes": 987654321, "disk": [{"serial": "0", "bus-type": "virtio"}]}`)
	}
	list.WriteString("]")
	c := guest(b, list.String())
	b.ReportAllocs()
	for b.Loop() {
		if mounts, err := c.Filesystems(b.Context()); err != nil || len(mounts) != 40 {
			b.Fatal(mounts, err)
		}
	}
}
