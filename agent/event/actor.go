package event

import "context"

type actorKey struct{}

// WithActor returns a context that says which user asks for what is done.
func WithActor(ctx context.Context, uid uint32) context.Context {
	return context.WithValue(ctx, actorKey{}, uid)
}

// Actor returns the user that a context carries, nil for vmsnapd itself.
func Actor(ctx context.Context) *uint32 {
	uid, ok := ctx.Value(actorKey{}).(uint32)
	if !ok {
		return nil
	}
	return &uid
}
