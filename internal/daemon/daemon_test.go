package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/api/client"
)

// program writes a shell script to start as a daemon.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vmsnapd")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStartFails(t *testing.T) {
	for name, test := range map[string]struct{ binary, want string }{
		"not built":      {filepath.Join(t.TempDir(), "none"), "make build"},
		"ends at once":   {program(t, "echo no such setting >&2; exit 1"), "no such setting"},
		"says it, fails": {program(t, "echo VMSNAPD $*; exit 1"), "--listed-only"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Start(t.Context(), Config{Binary: test.binary, Dir: t.TempDir()})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%q is not in: %v", test.want, err)
			}
		})
	}
}

func TestStartIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := Start(ctx, Config{Binary: program(t, "exec sleep 60"), Dir: t.TempDir()})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestStopTellsOfAnEarlyEnd(t *testing.T) {
	d := &Daemon{Client: client.New("none"), log: filepath.Join(t.TempDir(), "none"), ended: make(chan struct{})}
	d.err = errors.New("signal: killed")
	close(d.ended)
	if err := d.Stop(); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("got %v", err)
	}
}

func TestReady(t *testing.T) {
	for name, test := range map[string]struct {
		sent []string
		want bool
	}{
		"alone":        {[]string{"READY=1"}, true},
		"among others": {[]string{"STATUS=loading\nREADY=1\nMAINPID=7"}, true},
		"later":        {[]string{"STATUS=READY=1", "WATCHDOG=1", "READY=1\n"}, true},
		"not":          {[]string{"STATUS=READY=1", "READY=10"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := listenForReady(filepath.Join(t.TempDir(), "n"))
			if err != nil {
				t.Fatal(err)
			}
			defer n.close()
			say(t, n.path, test.sent...)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			ended := make(chan struct{})
			if !test.want {
				close(ended)
			}
			err = n.await(ctx, ended)
			if (err == nil) != test.want {
				t.Errorf("got %v", err)
			}
		})
	}
}

// say sends datagrams as a service does.
func say(t *testing.T, path string, messages ...string) {
	t.Helper()
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	for _, m := range messages {
		if _, err := conn.Write([]byte(m)); err != nil {
			t.Fatal(err)
		}
	}
}
