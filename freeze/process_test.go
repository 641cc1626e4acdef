package freeze

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestProcess(t *testing.T) {
	self, err := ProcessOf(os.Getpid())
	if err != nil || !self.Alive() {
		t.Fatalf("%+v, error %v", self, err)
	}
	if other := (Process{self.PID, self.StartTime + 1}); other.Alive() {
		t.Error("another process with the same pid counts as alive")
	}
	cmd := exec.Command("sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	p, err := ProcessOf(cmd.Process.Pid)
	if err != nil || !p.Alive() {
		t.Fatalf("%+v, error %v", p, err)
	}
	if err := (Process{p.PID, p.StartTime + 1}).end(t.Context(), 0); err != nil || !p.Alive() {
		t.Errorf("another process was ended, error %v", err)
	}
	if err := p.end(t.Context(), 10*time.Millisecond); err != nil {
		t.Error(err)
	}
	if p.Alive() { // not waited for yet: a zombie
		t.Error("alive after its end")
	}
	if err := p.end(t.Context(), time.Minute); err != nil {
		t.Errorf("second end: %v", err)
	}
}
