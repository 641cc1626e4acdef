package client

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// WatchEvents calls next with the events that a request asks for, as they come,
// each once and in order, until next returns an error, which it returns, or ctx
// ends. Where events were forgotten before they could be sent, next gets the
// gap.
//
// A broken stream is resumed where it broke, also over a restart of the daemon.
// WatchEvents gives up with the last error when the daemon stays away for two
// minutes, and when it refuses.
func (c *Client) WatchEvents(ctx context.Context, req *vmsnapv1.WatchEventsRequest, next func(*vmsnapv1.WatchEventsResponse) error) error {
	w := eventWatch{client: c, req: proto.CloneOf(req), next: next, heard: time.Now()}
	if req.Since == nil {
		if err := w.fromNow(ctx); err != nil {
			return err
		}
	}
	wait := resumeFirst
	for {
		heard := w.heard
		err := w.stream(ctx)
		switch {
		case w.ended != nil:
			return w.ended
		case ctx.Err() != nil:
			return ctx.Err()
		case !resumable(ctx, err):
			return err
		case w.heard != heard:
			wait = resumeFirst
		case time.Since(w.heard) > outageLimit:
			return fmt.Errorf("events after %d were lost sight of: %w", w.req.GetSince(), err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, resumeMax)
	}
}

// eventWatch is what WatchEvents knows over all of its streams.
type eventWatch struct {
	client *Client
	req    *vmsnapv1.WatchEventsRequest // its since is the last number that was seen
	next   func(*vmsnapv1.WatchEventsResponse) error
	ended  error // what next returned
	heard  time.Time
}

// fromNow finds out the last number there is, so that a stream that breaks
// before its first event can be resumed as well.
func (w *eventWatch) fromNow(ctx context.Context) error {
	res, err := w.client.events.ListEvents(ctx, connect.NewRequest(&vmsnapv1.ListEventsRequest{Limit: 1}))
	if err != nil {
		return err
	}
	w.req.Since = proto.Uint64(res.Msg.GetLastSeq())
	return nil
}

// stream follows the events over one stream.
func (w *eventWatch) stream(ctx context.Context) error {
	stream, err := w.client.events.WatchEvents(ctx, connect.NewRequest(w.req))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	if stream.ResponseHeader().Get("Server") != "" {
		// Hours may pass without an event: the outage begins when the stream ends.
		defer func() { w.heard = time.Now() }()
	}
	for stream.Receive() {
		news := stream.Msg()
		if w.ended = w.next(news); w.ended != nil {
			return w.ended
		}
		w.req.Since = proto.Uint64(max(news.GetEvent().GetSeq(), news.GetGap().GetToSeq()))
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errCutShort
}
