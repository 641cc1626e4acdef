package memdump

import (
	"os"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseCall(t *testing.T) {
	tests := map[string]struct {
		call    int
		running bool
		fails   bool
	}{
		"running\n":                         {call: -1, running: true},
		"202 0x5621095567a8 0x0 0x0 0x7f\n": {call: 202},
		"-1 0x7f4406ffc020 0x7f440a2c793f":  {call: -1},
		"":                                  {call: -1, fails: true},
		"read":                              {call: -1, fails: true},
	}
	for s, want := range tests {
		call, running, err := parseCall(s)
		if (err != nil) != want.fails || err == nil && call != want.call || running != want.running {
			t.Errorf("%q: %d, %t, %v", s, call, running, err)
		}
	}
}

func FuzzParseCall(f *testing.F) {
	f.Add("running")
	f.Add("-1 0x0")
	f.Fuzz(func(t *testing.T, s string) {
		if call, running, err := parseCall(s); running && (call != -1 || err != nil) {
			t.Errorf("%q: %d, %t, %v", s, call, running, err)
		}
	})
}

func TestThreadMayBeSaving(t *testing.T) {
	tests := map[string]struct {
		thread
		want bool
	}{
		"waits for a lock":       {thread{call: unix.SYS_FUTEX}, false},
		"waits for descriptors":  {thread{call: unix.SYS_PPOLL}, false},
		"runs the guest":         {thread{call: unix.SYS_IOCTL}, false},
		"computes":               {thread{call: -1, running: true}, false},
		"waits for a protection": {thread{call: -1, faulting: true}, false},
		"the kernel's":           {thread{call: 0, kernels: true}, false},
		"writes":                 {thread{call: unix.SYS_WRITEV}, true},
		"writes at an offset":    {thread{call: unix.SYS_PWRITEV}, true},
		"sends":                  {thread{call: unix.SYS_SENDMSG}, true},
		"syncs":                  {thread{call: unix.SYS_FSYNC}, true},
		"another fault":          {thread{call: -1}, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := test.mayBeSaving(); got != test.want {
				t.Errorf("may be saving: %t, want %t", got, test.want)
			}
		})
	}
}

func TestStillWaiting(t *testing.T) {
	fault := func(tid int, switches string) thread { return thread{tid: tid, faulting: true, switches: switches} }
	first := stillWaiting(nil, []thread{fault(1, "5"), fault(2, "6"), {tid: 3}}, true)
	if diff := cmp.Diff(map[int]string{1: "5", 2: "6"}, first); diff != "" {
		t.Errorf("at first\n%s", diff)
	}
	// The second was let write, and waits again; the third has begun to wait.
	second := stillWaiting(first, []thread{fault(1, "5"), fault(2, "7"), fault(3, "1")}, false)
	if diff := cmp.Diff(map[int]string{1: "5"}, second); diff != "" {
		t.Errorf("then\n%s", diff)
	}
	if third := stillWaiting(second, []thread{fault(2, "7"), fault(3, "1")}, false); len(third) > 0 {
		t.Errorf("at last %v", third)
	}
}

// What the kernel tells of the threads of another process is understood.
func TestThreads(t *testing.T) {
	cat := exec.Command("cat")
	stdin, err := cat.StdinPipe()
	if err == nil {
		err = cat.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stdin.Close(); err != nil {
			t.Error(err)
		}
		_ = cat.Wait()
	}()
	if err := unix.Kill(cat.Process.Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for {
		all, err := threads(cat.Process.Pid)
		if err != nil || len(all) != 1 {
			t.Fatalf("%+v, %v", all, err)
		}
		if th := all[0]; th.halted() {
			if th.tid != cat.Process.Pid || th.faulting || th.kernels || th.switches == "" {
				t.Errorf("%+v", th)
			}
			break
		}
	}
	if err := unix.Kill(cat.Process.Pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	own, err := threads(os.Getpid())
	if err != nil || len(own) < 2 {
		t.Fatalf("%+v, %v", own, err)
	}
}
