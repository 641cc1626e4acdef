package memdump

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// measureDirtyRate has QEMU measure how much memory the guest changes, in bytes
// per second. It takes samples of pages (page-sampling), so that the guest feels
// nothing. A QEMU that cannot measure gives 0.
//
// QEMU measures one thing at a time: if somebody has it measure already, that
// result is taken.
func measureDirtyRate(ctx context.Context, s *monitor.Session) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, measureWithin)
	defer cancel()
	args := map[string]any{"calc-time": 1} // seconds, the least that is allowed
	if s.AtLeast(8, 2) {
		args = map[string]any{"calc-time": measureTime.Milliseconds(), "calc-time-unit": "millisecond"}
	}
	begun := s.Execute(ctx, "calc-dirty-rate", args, nil)
	var refused *monitor.CommandError
	switch {
	case errors.As(begun, &refused) && refused.Class == monitor.ClassCommandNotFound: // before 5.2
		return 0, nil
	case begun != nil && refused == nil:
		return 0, begun
	}
	for {
		var r struct {
			Status string `json:"status"`
			Rate   *int64 `json:"dirty-rate"` // MiB per second
		}
		if err := s.Execute(ctx, "query-dirty-rate", nil, &r); err != nil {
			return 0, err
		}
		switch r.Status {
		case "measured":
			if r.Rate == nil {
				return 0, errors.New("query-dirty-rate: measured, without a rate")
			}
			return positive(*r.Rate) << 20, nil
		case "unstarted": // it may not have come to it yet
			if begun != nil {
				return 0, begun
			}
		}
		select {
		case <-time.After(measurePoll): // QEMU announces nothing
		case <-ctx.Done():
			return 0, fmt.Errorf("query-dirty-rate: %w", context.Cause(ctx))
		}
	}
}
