package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
)

// modelDeadline is for a model that hangs: it answers within milliseconds.
const modelDeadline = 10 * time.Second

// server is a socket of a scripted VM, which serves one client after the other,
// as QEMU does.
type server struct {
	listener net.Listener
	stop     context.CancelFunc
	ended    sync.WaitGroup
}

// conversation is what a server does with a client, until either has enough.
type conversation func(context.Context, *clientOf) error

// clientOf is a connection of lines. It keeps no buffer while nothing comes.
type clientOf struct {
	conn  net.Conn
	lines *bufio.Reader
}

// lineBuffer is enough for the commands that an idle VM gets.
const lineBuffer = 4 << 10

func (c *clientOf) line() ([]byte, error) { return c.lines.ReadBytes('\n') }

func (c *clientOf) write(b []byte) error {
	_, err := c.conn.Write(b)
	return err
}

func listen(path string, speak conversation) (*server, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &server{listener: l, stop: stop}
	s.ended.Go(func() { s.serve(ctx, speak) })
	return s, nil
}

func (s *server) serve(ctx context.Context, speak conversation) {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return // it was closed
		}
		unhook := context.AfterFunc(ctx, func() { _ = conn.Close() })
		_ = speak(ctx, &clientOf{conn, bufio.NewReaderSize(conn, lineBuffer)}) // its end is the client's matter
		unhook()
		_ = conn.Close()
	}
}

func (s *server) close() {
	s.stop()
	_ = s.listener.Close()
	s.ended.Wait()
}

// agentAnswers are those of a guest agent in a guest with one file system.
var agentAnswers = map[string]string{
	"guest-ping":            `{}`,
	"guest-info":            `{"version": "7.2.22", "supported_commands": []}`,
	"guest-fsfreeze-status": `"thawed"`,
	"guest-get-osinfo":      `{"id": "scripted", "name": "scripted"}`,
	"guest-get-fsinfo":      `[{"name": "vda", "mountpoint": "/", "type": "ext4", "disk": []}]`,
}

// speakAgent is what the guest agent of a scripted VM does with a client.
func speakAgent(_ context.Context, c *clientOf) error {
	for {
		line, err := c.line()
		if err != nil {
			return err
		}
		if err := c.write(agentReply(line)); err != nil {
			return err
		}
	}
}

func agentReply(line []byte) []byte {
	var in struct {
		Execute   string `json:"execute"`
		Arguments struct {
			ID json.RawMessage `json:"id"`
		} `json:"arguments"`
	}
	line = line[bytes.LastIndexByte(line, 0xff)+1:] // which ends whatever was begun
	if err := json.Unmarshal(line, &in); err != nil {
		return []byte(`{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n")
	}
	switch value, known := agentAnswers[in.Execute]; {
	case in.Execute == "guest-sync-delimited":
		return fmt.Appendf([]byte{0xff}, `{"return": %s}`+"\n", in.Arguments.ID)
	case known:
		return []byte(`{"return": ` + value + "}\n")
	default:
		return fmt.Appendf(nil, `{"error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}}`+"\n", in.Execute)
	}
}
