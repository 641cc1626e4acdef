package freeze

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/outlive"
)

// pipeFD is the descriptor at which a guard inherits its pipe.
const pipeFD = 3

// Main is the body of a guard process, and returns its exit code: 0 if the
// guest is known not to be frozen. The process must have been started by Start
// or Recover, whose pipe it inherits. It ignores the signals that end a service,
// and ends with its pipe or its lease instead, after the guest has answered
// thawed; cancelling the context is the same as closing the pipe.
//
// It logs by options, whose output is standard error when nil, in a way that
// never waits for the reader of the log.
func Main(ctx context.Context, options hclog.LoggerOptions) int {
	outlive.IgnoreSignals()
	if options.Output == nil {
		options.Output = os.Stderr
	}
	out := outlive.NewPatientWriter(options.Output)
	defer out.Flush(sendTimeout)
	options.Output = out
	log := hclog.New(&options)

	p, h, err := accept()
	if err != nil {
		log.Error("guard cannot start", "error", err)
		return 1
	}
	log = log.With("lease", h.ID, "vm", h.Request.VM, "vm_id", h.Request.VMID, "operation", h.Request.Operation)
	if err := outlive.AvoidOOM(); err != nil {
		log.Warn("guard is not protected from the OOM killer", "error", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	k := newKeeper(h, p, log)
	go k.listen(cancel)
	return k.run(ctx)
}

// accept takes over the inherited pipe and reads the request from it.
func accept() (*pipe, hello, error) {
	unix.CloseOnExec(pipeFD)
	file := os.NewFile(pipeFD, "agent")
	if file == nil {
		return nil, hello{}, fmt.Errorf("no pipe at descriptor %d", pipeFD)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, hello{}, fmt.Errorf("pipe at descriptor %d: %w", pipeFD, err)
	}
	// FileConn has a copy; a second one here would only keep the pipe open.
	if err := file.Close(); err != nil {
		return nil, hello{}, err
	}
	p := newPipe(conn)
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return nil, hello{}, err
	}
	var h hello
	if err := p.read(&h); err != nil {
		return nil, hello{}, fmt.Errorf("read the request: %w", err)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return nil, hello{}, err
	}
	return p, h, h.Request.check()
}
