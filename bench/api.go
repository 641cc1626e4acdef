package main

import (
	"context"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// How often the API and the start are measured.
const (
	listCalls  = 1000
	warmCalls  = 50
	starts     = 10
	shortCalls = 200
	shortStart = 3
)

// measureAPI measures what the API takes with one VM, and a start of vmsnapd.
func (s *scene) measureAPI(ctx context.Context, c config, r *report) error {
	calls, restarts := listCalls, starts
	if c.short {
		calls, restarts = shortCalls, shortStart
	}
	var lists, ready []time.Duration
	for i := range warmCalls + calls {
		began := time.Now()
		if _, err := s.daemon.VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{})); err != nil {
			return err
		}
		if i >= warmCalls {
			lists = append(lists, time.Since(began))
		}
	}
	for range restarts {
		if err := s.stopDaemon(); err != nil {
			return err
		}
		if err := s.startDaemon(ctx); err != nil {
			return err
		}
		ready = append(ready, s.daemon.Ready)
	}
	r.addAPI(s.qemu.Name, lists, ready)
	return nil
}
