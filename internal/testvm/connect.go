package testvm

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ErrEnded means that a program has ended before it listened on its socket.
var ErrEnded = errors.New("it ended before it listened")

// connectInterval is the time between attempts to connect.
const connectInterval = 2 * time.Millisecond

// Connect calls dial until it succeeds, with the socket of a program that is
// starting: that the file of a socket is made is an event, that somebody listens on
// it is not. It fails with ErrEnded when ended is closed, which is nil for a program
// whose end nobody waits for, and with the error of dial when the context ends.
func Connect[C any](ctx context.Context, ended <-chan struct{}, dial func(context.Context) (C, error)) (C, error) {
	ticker := time.NewTicker(connectInterval)
	defer ticker.Stop()
	for {
		c, err := dial(ctx)
		if err == nil {
			return c, nil
		}
		select {
		case <-ended:
			return c, ErrEnded
		case <-ctx.Done():
			return c, fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-ticker.C:
		}
	}
}
