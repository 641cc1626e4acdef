package memdump

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/monitor"
)

// ErrPauseGuard says that the process that would resume the VM did not start,
// has ended or does not answer. A VM must not be paused then.
var ErrPauseGuard = errors.New("the pause guard failed")

// GuardConfig is what a pause guard needs to know.
type GuardConfig struct {
	// Command is a program that calls RunGuard, and its arguments.
	Command []string
	// Session is the one by which the VM will be paused. The guard inherits a
	// duplicate of its connection.
	Session *monitor.Session
	// Sockets are the VM's QMP sockets, tried in turn when the connection does
	// not serve any more.
	Sockets []string
	// VM is its name, for the log.
	VM string
	// PID and StartTime (clock ticks since boot) are the QEMU process.
	PID       int
	StartTime uint64
	// Resumed is the path of a file that the guard makes, durably, once the VM
	// runs after it has taken over. Recovery then knows that nothing is left to
	// resume, whoever may have paused or migrated the VM since. Removing it is
	// the caller's business. Empty for none.
	Resumed string
	// Log may be nil.
	Log hclog.Logger
}

// PauseGuard resumes a VM that its agent has paused and cannot resume, because
// it was killed, stopped, or hangs. The guard is a process of its own, started
// before the pause, that inherits a duplicate of the agent's QMP connection:
// a monitor serves one client, and while the agent is stopped nobody else could
// connect. It leaves the connection alone until it has to act.
//
// It acts between Arm and Disarm: when the agent's process ends or says nothing
// for a second, when the pause lasts longer than its limit, when the session
// ends, or when Close is called. Then it resumes the VM as Resume does, within
// milliseconds if QEMU answers, and shuts the connection down, so that the
// session of an agent that wakes up is gone. It does not end before the VM runs
// or QEMU has ended, or five minutes have passed.
//
// Until Close, or the end of the session, QEMU serves no other client.
//
// Its methods may be called from any goroutine.
type PauseGuard struct {
	cfg  GuardConfig
	log  hclog.Logger
	cmd  *exec.Cmd
	pipe *net.UnixConn
	in   *bufio.Reader

	disarmed chan struct{} // an answer to each disarm
	taken    chan struct{} // closed when the guard acts
	ended    chan struct{} // closed when its process has ended

	mu   sync.Mutex
	beat func() // stops the beats; nil while not armed
}

// StartGuard runs a guard and returns when it is ready. It forks and takes
// milliseconds, so it belongs before the pause. The context bounds the start
// only. It fails with ErrPauseGuard, or with the reason of the session's end.
func StartGuard(ctx context.Context, cfg GuardConfig) (*PauseGuard, error) {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	g := &PauseGuard{
		cfg:      cfg,
		log:      cfg.Log.With("vm", cfg.VM),
		disarmed: make(chan struct{}, 1),
		taken:    make(chan struct{}),
		ended:    make(chan struct{}),
	}
	if err := g.launch(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPauseGuard, err)
	}
	if err := g.greet(ctx); err != nil {
		_ = g.cmd.Process.Kill() // it may have ended already
		_ = g.cmd.Wait()
		return nil, fmt.Errorf("%w: %w", ErrPauseGuard, errors.Join(err, g.pipe.Close()))
	}
	go g.listen()
	go g.followSession()
	return g, nil
}

// launch starts the process, in a session of its own, so that no terminal and
// no process group's signal reaches it.
func (g *PauseGuard) launch() error {
	if len(g.cfg.Command) == 0 {
		return errors.New("no command is configured")
	}
	qmp, err := g.cfg.Session.File()
	if err != nil {
		return err
	}
	defer func() { _ = qmp.Close() }()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make its pipe: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "guard"), os.NewFile(uintptr(fds[1]), "agent")
	defer func() { _ = errors.Join(ours.Close(), theirs.Close()) }() // conn and process have copies
	conn, err := net.FileConn(ours)
	if err != nil {
		return fmt.Errorf("make its pipe: %w", err)
	}
	g.pipe = conn.(*net.UnixConn) // a Unix socket makes nothing else
	g.in = bufio.NewReader(conn)
	// Not CommandContext: it is to outlive whatever ends here.
	g.cmd = exec.Command(g.cfg.Command[0], g.cfg.Command[1:]...)
	g.cmd.Dir = "/"
	g.cmd.Stderr = os.Stderr
	g.cmd.ExtraFiles = []*os.File{theirs, qmp} // guardPipeFD, guardQMPFD
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := g.cmd.Start(); err != nil {
		return errors.Join(err, conn.Close())
	}
	return nil
}

// greet tells the guard what to do, and waits until it is ready.
func (g *PauseGuard) greet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, guardStart)
	defer cancel()
	hello, err := json.Marshal(guardHello{
		ID: newGuardID(), VM: g.cfg.VM, Sockets: g.cfg.Sockets,
		PID: g.cfg.PID, StartTime: g.cfg.StartTime, Resumed: g.cfg.Resumed,
	})
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = g.pipe.SetDeadline(time.Unix(1, 0)) })
	_, err = g.pipe.Write(append(hello, '\n'))
	var answer string
	if err == nil {
		answer, err = g.word()
	}
	interrupted := !stop()
	reason, failed := strings.CutPrefix(answer, wordFailed+" ")
	switch {
	case interrupted:
		return fmt.Errorf("it is not ready: %w", context.Cause(ctx))
	case errors.Is(err, io.EOF):
		return errors.New("it ended before it was ready")
	case failed:
		return errors.New(reason)
	case err == nil && answer != wordReady:
		return fmt.Errorf("it said %q", answer)
	}
	return err
}

func newGuardID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Arm has the guard resume the VM unless Disarm comes within the limit, or when
// this process ends or stops before. It costs microseconds and comes before the
// command that pauses the VM. A VM that its owner has paused must not be
// guarded: the guard would let it run. Where QEMU will pause the VM by itself,
// at the end of a migration, it comes before that begins; called again it begins
// a new limit. It fails with ErrPauseGuard.
func (g *PauseGuard) Arm(limit time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case limit <= 0:
		return fmt.Errorf("%w: a limit of %s", ErrPauseGuard, limit)
	case isClosed(g.taken):
		return fmt.Errorf("%w: it has taken over", ErrPauseGuard)
	case isClosed(g.cfg.Session.Done()):
		return fmt.Errorf("%w: %w", ErrPauseGuard, g.cfg.Session.Err())
	}
	if err := g.say(wordArm + " " + strconv.FormatInt(int64(limit), 10)); err != nil {
		return fmt.Errorf("%w: %w", ErrPauseGuard, err)
	}
	if g.beat != nil {
		return nil
	}
	stop := make(chan struct{})
	g.beat = sync.OnceFunc(func() { close(stop) })
	go g.beats(stop)
	return nil
}

// beats tells the guard that this process runs.
func (g *PauseGuard) beats(stop <-chan struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-g.ended:
			return
		case <-tick.C:
			// A guard that does not take it has ended, which listen notices, or
			// is stopped, which Disarm does.
			_ = g.say(wordBeat)
		}
	}
}

// Disarm ends what Arm began. It comes when QEMU has said that the VM runs. It
// tells whether the guard has acted: then the session is gone or about to go,
// the VM runs or is about to, and the memory may be later than the cut.
//
// It is sure of its answer, and fails with ErrPauseGuard only if a guard that
// does not answer cannot be killed either.
func (g *PauseGuard) Disarm() (acted bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.beat == nil {
		return isClosed(g.taken), nil
	}
	g.beat()
	g.beat = nil
	told := g.say(wordDisarm)
	hung := time.NewTimer(guardAnswer)
	defer hung.Stop()
	select {
	case <-g.disarmed:
		return false, nil
	case <-g.taken:
		return true, nil
	case <-g.ended:
		return g.lost(told), nil
	case <-hung.C:
	}
	g.log.Error("the pause guard does not answer and is killed", "guard", g.cmd.Process.Pid)
	err = g.kill()
	return isClosed(g.taken), err
}

// lost tells whether a guard that has ended had acted. It says so first, and so
// one that ended without a word has done nothing, whoever killed it.
func (g *PauseGuard) lost(cause error) (acted bool) {
	select {
	case <-g.disarmed:
		return false
	default:
	}
	acted = isClosed(g.taken)
	g.log.Warn("the pause guard has ended during the pause", "acted", acted, "error", cause)
	return acted
}

// Close ends the guard and returns when its process has ended. While it is
// armed, that makes it resume the VM, and the session is gone; if QEMU does not
// let it, the error is ErrPauseGuard and the attempts go on. It may be called
// more than once.
func (g *PauseGuard) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.beat != nil {
		g.beat()
		g.beat = nil
		g.cfg.Session.HandOver()
	}
	// It fails only if the guard has ended.
	_ = g.pipe.CloseWrite()
	hung := time.NewTimer(guardEnd)
	defer hung.Stop()
	select {
	case <-g.ended:
		return nil
	case <-hung.C:
	}
	if isClosed(g.taken) {
		return fmt.Errorf("%w: the VM is not known to run after %s; its attempts go on", ErrPauseGuard, guardEnd)
	}
	g.log.Error("the pause guard does not end and is killed", "guard", g.cmd.Process.Pid)
	return g.kill()
}

// kill ends a guard that is stopped or hung.
func (g *PauseGuard) kill() error {
	if err := g.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%w: %w", ErrPauseGuard, err)
	}
	select {
	case <-g.ended:
		return nil
	case <-time.After(guardEnd):
		return fmt.Errorf("%w: it does not end within %s of being killed", ErrPauseGuard, guardEnd)
	}
}

// listen takes the guard's words until it has ended.
func (g *PauseGuard) listen() {
	for {
		word, err := g.word()
		if err != nil {
			break
		}
		switch word {
		case wordDisarmed:
			select {
			case g.disarmed <- struct{}{}:
			default: // nobody waits for it any more
			}
		case wordTaken:
			close(g.taken)
			g.log.Error("the pause guard resumes the VM")
			g.cfg.Session.HandOver()
			_ = g.say(wordYield) // a guard that does not take it goes on without
		}
	}
	// How it ended says nothing new: it has logged why.
	_ = g.cmd.Wait()
	_ = g.pipe.Close()
	close(g.ended)
}

// followSession tells the guard, by closing its pipe, when the session has
// ended: an armed one has to resume the VM then, and another one would keep the
// monitor from its next client.
func (g *PauseGuard) followSession() {
	select {
	case <-g.cfg.Session.Done():
		_ = g.pipe.CloseWrite() // fails only if the guard has ended
	case <-g.ended:
	}
}

// say sends a word.
func (g *PauseGuard) say(word string) error {
	if err := g.pipe.SetWriteDeadline(time.Now().Add(guardWrite)); err != nil {
		return err
	}
	_, err := g.pipe.Write([]byte(word + "\n"))
	return err
}

// word receives one.
func (g *PauseGuard) word() (string, error) {
	line, err := g.in.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
