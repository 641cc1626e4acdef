package rpc

import "context"

// WithPeer marks a call with who makes it, as Serve does.
func WithPeer(ctx context.Context, p Peer) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}
