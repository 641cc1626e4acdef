package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// server carries out the requests of the host.
type server struct {
	params  parameters
	ports   map[string]string // devices by port name
	control *port
	sending sync.Mutex // one message at a time on control

	writersMu sync.Mutex
	writers   *writers // nil when stopped

	agentMu sync.Mutex
	agent   *agent // nil when it was never started

	counter counter
	dirtier dirtier
}

// serve brings the guest up and serves the host. It returns only with an error.
func serve() error {
	params, err := readParameters()
	if err != nil {
		return err
	}
	events, err := subscribeUevents()
	if err != nil {
		return err
	}
	if err := mountLabels(events, params.mounts); err != nil {
		return err
	}
	s := &server{params: params}
	err = events.until(func() (bool, error) {
		s.ports, err = portDevices()
		return s.ports[wire.ControlPort] != "", err
	})
	if err != nil {
		return err
	}
	if err := events.close(); err != nil {
		return err
	}
	// Ports are announced in the order of their numbers, the control port last.
	if s.control, err = openPort(s.ports[wire.ControlPort]); err != nil {
		return err
	}
	if s.ports[wire.AgentPort] != "" {
		if err := s.startAgent(); err != nil {
			return err
		}
	}
	go watchPowerButton(s)
	if err := s.send(wire.Reply{Event: wire.EventReady}); err != nil {
		return err
	}
	return s.receive()
}

func (s *server) receive() error {
	lines := bufio.NewReader(s.control)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("read control port: %w", err)
		}
		var req wire.Request
		if json.Unmarshal(line, &req) != nil {
			continue // the rest of a message whose host went away
		}
		go func() {
			reply := s.handle(req)
			reply.ID = req.ID
			if err := s.send(reply); err != nil {
				fmt.Fprintf(os.Stderr, "testvm guest: %v\n", err)
			}
		}()
	}
}

func (s *server) send(reply wire.Reply) error {
	line, err := json.Marshal(reply)
	if err != nil {
		return err
	}
	s.sending.Lock()
	defer s.sending.Unlock()
	if _, err := s.control.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("write control port: %w", err)
	}
	return nil
}

func (s *server) handle(req wire.Request) wire.Reply {
	var reply wire.Reply
	var err error
	switch req.Op {
	case wire.OpExec:
		reply, err = run(req.Command, req.Data)
	case wire.OpWrite:
		err = writeDurably(req.Path, req.Data)
	case wire.OpRead:
		reply.Stdout, err = os.ReadFile(req.Path)
	case wire.OpStartWriters:
		err = s.startWriters()
	case wire.OpStopWriters:
		err = s.stopWriters()
	case wire.OpScan:
		reply.Sequence, err = scan(req.Path)
	case wire.OpStartCounter:
		err = s.counter.start(s.params.mounts)
	case wire.OpCount:
		if reply.Sequence, err = s.counter.read(); err == nil {
			err = s.dirtier.verify()
		}
	case wire.OpDirty:
		err = s.dirtier.set(req.Size, req.Rate)
	case wire.OpStartAgent:
		err = s.startAgent()
	case wire.OpPowerOff:
		err = s.powerOff()
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	if err != nil {
		reply.Err = err.Error()
	}
	return reply
}

func run(command string, stdin []byte) (wire.Reply, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("sh", "-c", command)
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A session of its own, so that what it leaves in the background is not
	// waited for by a shell of ours.
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err := cmd.Run()
	reply := wire.Reply{Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		reply.Code = exit.ExitCode()
		if reply.Code < 0 { // a signal
			reply.Code = 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
		}
		return reply, nil
	}
	return reply, err
}

func writeDurably(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	err = dir.Sync()
	if errors.Is(err, unix.EINVAL) {
		return nil // not on a disk
	}
	return err
}
