package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"time"
)

// readiness is a socket on which a service says that it is ready, as systemd
// has it (sd_notify(3)).
type readiness struct {
	path string
	conn *net.UnixConn
}

// listenForReady makes the socket, in the place of one left by an earlier start.
func listenForReady(path string) (*readiness, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		return nil, err
	}
	return &readiness{path, conn}, nil
}

// await returns when the service is ready. It fails when ctx or the service
// ends before that.
func (r *readiness) await(ctx context.Context, ended <-chan struct{}) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-ended:
			cancel(errors.New("it has ended"))
		case <-ctx.Done():
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = r.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, 4096)
	for {
		n, err := r.conn.Read(b)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		for line := range strings.SplitSeq(string(b[:n]), "\n") {
			if line == "READY=1" {
				return nil
			}
		}
	}
}

func (r *readiness) close() { _ = r.conn.Close() }
