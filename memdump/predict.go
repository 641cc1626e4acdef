package memdump

import (
	"context"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// A Prediction is what a save will cost, roughly.
type Prediction struct {
	Pause     time.Duration
	Duration  time.Duration
	Bytes     uint64 // written
	DirtyRate uint64 // bytes of memory that the guest changes per second; 0 if unknown
}

// Predict measures how fast the guest changes its memory, for at most about a
// second, and says what a save will cost. targetRate is what the file takes, in
// bytes per second; 0 if unknown.
func Predict(ctx context.Context, s *monitor.Session, f Facts, c Choice, targetRate uint64) (Prediction, error) {
	return Prediction{}, nil
}
