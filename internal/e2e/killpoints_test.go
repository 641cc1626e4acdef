package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// effects are the system calls by which a snapshot changes files: the layers'
// and the catalog's. The tracer counts them for each thread of the daemon.
var effects = []string{"linkat", "renameat", "fsync", "ioctl", "fchown", "fchmod", "unlinkat", "mkdirat"}

// killPoint is where the daemon is killed: as it enters a system call for the
// n-th time, on one of some files if they are given. With n 0 it is not killed,
// and the calls are counted.
type killPoint struct {
	calls []string // one, if n is not 0
	n     int
	files []string
}

func (p killPoint) String() string {
	if p.n == 0 {
		return "not killed"
	}
	return fmt.Sprintf("killed at %s %d", p.calls[0], p.n)
}

// killAt attaches a tracer that kills the daemon. The processes that the daemon
// starts are let go as they begin.
func (h *host) killAt(p killPoint) *exec.Cmd {
	h.t.Helper()
	args := []string{"-f", "-b", "execve", "-q", "-o", h.path("calls"), "-e", "trace=" + strings.Join(p.calls, ","),
		"-p", fmt.Sprint(h.daemon.Process.Pid)}
	if p.n > 0 {
		args = append(args, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", p.calls[0], p.n))
	}
	for _, f := range p.files {
		args = append(args, "-P", f)
	}
	tracer := exec.Command("strace", args...)
	if err := tracer.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.traced()
	return tracer
}

// traced waits until a tracer is attached to the daemon.
func (h *host) traced() {
	h.t.Helper()
	h.eventually(eventLimit, "the tracer is attached", func() error {
		if strings.Contains(h.status(), "TracerPid:\t0\n") {
			return errors.New("not traced")
		}
		return nil
	})
}

// diedOr waits until the daemon was killed or has done its work, and says which.
// It takes the tracer off.
func (h *host) diedOr(tracer *exec.Cmd, done func() error) (killed bool) {
	h.t.Helper()
	defer func() {
		_ = tracer.Process.Signal(syscall.SIGINT)
		_ = tracer.Wait()
	}()
	h.eventually(eventLimit, "the daemon is killed, or has done its work", func() error {
		select {
		case <-h.exited:
			killed = true
			tally.add("kills of the daemon at a change of files", 1)
			return nil
		default:
		}
		return done()
	})
	return killed
}

// called returns how often each system call was made by the thread that made it
// the most, as the tracer has written it down.
func (h *host) called() map[string]int {
	h.t.Helper()
	f, err := os.Open(h.path("calls"))
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	most, byThread := map[string]int{}, map[string]int{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		thread, rest, _ := strings.Cut(lines.Text(), " ")
		call, _, is := strings.Cut(strings.TrimSpace(rest), "(")
		if !is || strings.HasPrefix(call, "<") {
			continue // the second half of a call, or a signal
		}
		byThread[thread+" "+call]++
		most[call] = max(most[call], byThread[thread+" "+call])
	}
	if err := lines.Err(); err != nil {
		h.t.Fatal(err)
	}
	return most
}

// killedAtEach has round kill the daemon at each of some system calls, of which
// those that it must make are given by name. round says whether it was killed.
//
// What the daemon does to files does not depend on QEMU's version, so the
// versions share the points between them, each beginning at another; with
// -torture.rounds each visits all.
func (h *host) killedAtEach(q testvm.QEMU, calls, files []string, round func(p killPoint, round int) bool, must ...string) {
	h.t.Helper()
	rounds, killed := 1, map[string]int{}
	kill := func(call string, n int) bool {
		rounds++
		died := round(killPoint{calls: []string{call}, n: n, files: files}, rounds)
		if died {
			killed[call]++
		}
		return died
	}
	round(killPoint{calls: calls, files: files}, rounds)
	first, stride := share(h.t, q)
	counts := h.called()
	for _, call := range calls {
		if thorough() {
			for n := 1; kill(call, n); n++ {
			}
			continue
		}
		for n := first; n <= counts[call]; n += stride {
			kill(call, n)
		}
		if killed[call] == 0 && counts[call] > 0 { // the other threads made the others
			kill(call, 1)
		}
	}
	h.t.Logf("killed at %v in %d rounds", killed, rounds)
	for _, call := range must {
		if killed[call] == 0 {
			h.t.Errorf("the daemon was never killed at %s: the tracer does not see it", call)
		}
	}
}

// share returns which of the points that all versions visit between them are
// this one's: the first, and the distance to the next.
func share(t *testing.T, q testvm.QEMU) (first, stride int) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(versions, func(v testvm.QEMU) bool { return v.Name == q.Name })
	return i + 1, len(versions)
}
