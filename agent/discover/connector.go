package discover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// connector is a subscription to the kernel's process events
// (drivers/connector/cn_proc.c), of which it delivers one kind: the execution
// of a program. netlink.ProcEventMonitor is not used: it ignores whether the
// kernel accepted the subscription, ends at the first lost event, blocks for
// ever when its reader leaves, and decodes every fork and exit of every thread
// on the host.
type connector struct {
	fd  int
	ack uint32 // what the kernel's acknowledgement will carry
	buf [4096]byte
}

// execution is a program that was executed.
type execution struct {
	pid  int
	when time.Duration // of the monotonic clock, as monotonic() tells it
}

// errOverrun means that events were lost since the socket's buffer was full.
var errOverrun = errors.New("process events were lost")

// connectorBuffer is the socket's receive buffer in bytes: some thousand
// program starts, which is more than a host makes while we read.
const connectorBuffer = 4 << 20

// The requests (linux/cn_proc.h, enum proc_cn_mcast_op).
const (
	listen = 1
	ignore = 2
)

// Offsets in a message: struct nlmsghdr, then struct cn_msg, then struct
// proc_event (linux/netlink.h, connector.h, cn_proc.h).
const (
	offIdx       = unix.SizeofNlMsghdr
	offVal       = offIdx + 4
	offAck       = offIdx + 12
	offEvent     = offIdx + 20
	offTimestamp = offEvent + 8
	offData      = offEvent + 16 // an acknowledgement's error; an execution's pid and tgid
	minMessage   = offData + 8
)

// openConnector subscribes. It fails where the kernel lacks the connector,
// outside the initial network, user and pid namespaces, and, before Linux 6.6,
// without CAP_NET_ADMIN.
func openConnector() (_ *connector, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("process connector: %w", err)
	}
	c := &connector{fd: fd, ack: rand.Uint32()}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	if err := c.configure(); err != nil {
		return nil, err
	}
	if err := c.request(listen); err != nil {
		return nil, err
	}
	return c, c.awaitAck()
}

// configure sets the buffer and the filter, and joins the group.
func (c *connector) configure() error {
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, connectorBuffer) != nil {
		// Not privileged: what the host allows to everyone will do.
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, connectorBuffer); err != nil {
			return fmt.Errorf("process connector: receive buffer: %w", err)
		}
	}
	filter, err := executionsOnly()
	if err != nil {
		return fmt.Errorf("process connector: filter: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(c.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("process connector: filter: %w", err)
	}
	group := &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (netlink.CN_IDX_PROC - 1)}
	if err := unix.Bind(c.fd, group); err != nil {
		return fmt.Errorf("process connector: join: %w", err)
	}
	return nil
}

// executionsOnly lets executions and acknowledgements pass, so that the forks,
// exits and thread starts of a busy host do not wake us.
func executionsOnly() ([]unix.SockFilter, error) {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: offEvent, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: asLoaded(netlink.PROC_EVENT_EXEC), SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: asLoaded(netlink.PROC_EVENT_NONE), SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 1 << 16},
	})
	if err != nil {
		return nil, err
	}
	out := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		out[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return out, nil
}

// asLoaded returns what a filter sees of a word in the host's byte order: it
// loads words in network order.
func asLoaded(v uint32) uint32 {
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, v))
}

// request asks the kernel to start or stop sending events.
func (c *connector) request(op uint32) error {
	msg := nl.NewCnMsg(netlink.CN_IDX_PROC, netlink.CN_VAL_PROC, op)
	msg.Ack = c.ack - 1 // the kernel answers with one more
	req := nl.NetlinkRequest{NlMsghdr: unix.NlMsghdr{
		Len: unix.SizeofNlMsghdr, Type: unix.NLMSG_DONE, Pid: uint32(os.Getpid()),
	}}
	req.AddData(msg)
	if err := unix.Sendto(c.fd, req.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("process connector: request: %w", err)
	}
	return nil
}

// awaitAck waits until the kernel has answered the subscription. Executions
// before that are of no interest: the first scan comes later.
func (c *connector) awaitAck() error {
	for deadline := time.Now().Add(ackDeadline); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return errors.New("process connector: no acknowledgement: " +
				"it serves the initial pid and user namespaces only, and before Linux 6.6 CAP_NET_ADMIN")
		}
		msg, err := c.receive()
		switch {
		case errors.Is(err, unix.EAGAIN):
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("process connector: await acknowledgement: %w", err)
			}
		case errors.Is(err, errOverrun):
		case err != nil:
			return err
		case c.isAck(msg):
			if code := word(msg, offData); code != 0 {
				return fmt.Errorf("process connector: refused: %w", unix.Errno(code))
			}
			return nil
		}
	}
}

// isAck tells the answer to our request from those to others, which every
// subscriber receives. Its sequence number is the kernel's own.
func (c *connector) isAck(msg []byte) bool {
	return msg != nil && word(msg, offEvent) == netlink.PROC_EVENT_NONE && word(msg, offAck) == c.ack
}

// next returns the next execution. It fails with EAGAIN when there is none,
// and with errOverrun when some were lost.
func (c *connector) next() (execution, error) {
	for {
		msg, err := c.receive()
		if err != nil {
			return execution{}, err
		}
		if e, ok := parseExecution(msg); ok {
			return e, nil
		}
	}
}

// receive returns one message of the kernel's, valid until the next call, or
// nil for one that is of no use.
func (c *connector) receive() ([]byte, error) {
	n, from, err := unix.Recvfrom(c.fd, c.buf[:], unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.ENOBUFS):
		return nil, errOverrun
	case errors.Is(err, unix.EINTR):
		return nil, nil
	case errors.Is(err, unix.EAGAIN):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("process connector: receive: %w", err)
	}
	// Any process may send to a netlink socket; only the kernel has port 0.
	if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
		return nil, nil
	}
	return checkMessage(c.buf[:n]), nil
}

// checkMessage returns a message that is a complete process event, else nil.
func checkMessage(msg []byte) []byte {
	if len(msg) < minMessage || word(msg, offIdx) != netlink.CN_IDX_PROC || word(msg, offVal) != netlink.CN_VAL_PROC {
		return nil
	}
	return msg
}

func parseExecution(msg []byte) (execution, bool) {
	if msg == nil || word(msg, offEvent) != netlink.PROC_EVENT_EXEC {
		return execution{}, false
	}
	return execution{
		pid:  int(word(msg, offData+4)), // the thread group: execution ends all other threads
		when: time.Duration(binary.NativeEndian.Uint64(msg[offTimestamp:])),
	}, true
}

func word(msg []byte, off int) uint32 { return binary.NativeEndian.Uint32(msg[off:]) }

// close ends the subscription. Kernels before 6.6 do not notice a closed
// socket and would go on making events for nobody.
func (c *connector) close() error {
	return errors.Join(c.request(ignore), unix.Close(c.fd))
}

// monotonic is the clock by which the kernel stamps its events.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("monotonic clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
