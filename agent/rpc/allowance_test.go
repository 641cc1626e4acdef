package rpc

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

func as(uid uint32) context.Context {
	return context.WithValue(context.Background(), peerKey{}, Peer{UID: uid})
}

func TestCallsUnderWayAreBounded(t *testing.T) {
	a := newAllowances()
	var leave []func()
	for range mostCalls {
		out, err := a.enter(as(1))
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, out)
	}
	if _, err := a.enter(as(1)); fault.Of(err) != fault.Busy || !strings.Contains(err.Error(), "uid 1 has 512 calls under way") {
		t.Errorf("one more: %v", err)
	}
	if _, err := a.enter(as(2)); err != nil {
		t.Errorf("another user: %v", err)
	}
	leave[7]()
	if _, err := a.enter(as(1)); err != nil {
		t.Errorf("once a call has ended: %v", err)
	}
}

func TestCallRateIsBounded(t *testing.T) {
	now := time.Unix(1e9, 0)
	a := newAllowances()
	a.now = func() time.Time { return now }
	call := func(uid uint32) bool {
		leave, err := a.enter(as(uid))
		if err == nil {
			leave()
		} else if fault.Of(err) != fault.Busy {
			t.Fatal(err)
		}
		return err == nil
	}
	made := func() (n int) {
		for call(1) {
			n++
		}
		return n
	}
	if n := made(); n != callBurst {
		t.Errorf("%d calls at once, want %d", n, callBurst)
	}
	if !call(2) {
		t.Error("another user is refused")
	}
	now = now.Add(time.Second / 2)
	if n := made(); n != callRate/2 {
		t.Errorf("%d calls after half a second, want %d", n, callRate/2)
	}
	now = now.Add(time.Minute)
	if n := made(); n != callBurst {
		t.Errorf("%d calls after a minute, want %d", n, callBurst)
	}
	now = now.Add(time.Minute)
	call(3)
	if len(a.users) != 1 {
		t.Errorf("%d users are remembered, want the one", len(a.users))
	}
}
