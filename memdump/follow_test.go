package memdump

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"testing"
	"time"
)

// followLimit is ample for what a test waits for.
const followLimit = 60 * time.Second

func followContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), followLimit)
	t.Cleanup(cancel)
	return ctx
}

// until waits for something that the follower does on its own time.
func until(ctx context.Context, t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("waiting until %s: %v", what, ctx.Err())
		case <-tick.C:
		}
	}
}

// following starts Follow; the function returned ends it.
func following(ctx context.Context, t *testing.T, f *File) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- f.Follow(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("follow: %v", err)
		}
	}
}

// Another process writes in uneven pieces, with a descriptor that shares the
// target's offset, while the file is followed, not followed, and followed again.
func TestFollowLiveWriter(t *testing.T) {
	ctx := followContext(t)
	root := openRoot(t, t.TempDir())
	data := pattern(6*inFlight + 4321)
	f := created(t, root, "m", len(data))
	writer := exec.CommandContext(ctx, "dd", "bs=60001", "status=none")
	in, err := writer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	writer.Stdout = f.Target()
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	half := len(data) / 2
	feed := func(b []byte) {
		t.Helper()
		if _, err := io.Copy(in, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
	}
	stop := following(ctx, t, f)
	feed(data[:half])
	until(ctx, t, "the follower is near", func() bool { return f.follower.hashed.Load() > int64(half-1<<20) })
	stop()
	feed(data[half : half+inFlight])
	stop = following(ctx, t, f)
	feed(data[half+inFlight:])
	if err := errors.Join(in.Close(), writer.Wait()); err != nil {
		t.Fatal(err)
	}
	stop()
	at, err := f.Target().Seek(0, io.SeekCurrent)
	if n, werr := f.Written(); err != nil || werr != nil || int64(n) != at-HeaderSize || int(n) != len(data) {
		t.Errorf("%d bytes written, the writer is at %d, %v, %v", n, at, err, werr)
	}
	sum, err := f.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if sum.Checksum != digestOf(data) || sum.Length != uint64(len(data)) {
		t.Errorf("got %+v, want %s over %d bytes", sum, digestOf(data), len(data))
	}
	if _, _, err := Verify(ctx, root, "m", nil, nil); err != nil {
		t.Error(err)
	}
}

// What is followed leaves the page cache while it is being written, and the
// rest when it is finished.
func TestFollowDropsPages(t *testing.T) {
	ctx := followContext(t)
	root := openRoot(t, t.TempDir())
	const size = 4 * inFlight
	f := created(t, root, "m", size)
	stop := following(ctx, t, f)
	if _, err := f.Target().Write(pattern(size)); err != nil {
		t.Fatal(err)
	}
	until(ctx, t, "all but the last windows are dropped", func() bool {
		return residentBytes(t, root, "m") <= inFlight+2*window
	})
	stop()
	if _, err := f.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	if n := residentBytes(t, root, "m"); n > window {
		t.Errorf("%d bytes are cached after the end", n)
	}
}

func TestFollowExcludesOthers(t *testing.T) {
	ctx := followContext(t)
	f := created(t, openRoot(t, t.TempDir()), "m", 0)
	stop := following(ctx, t, f)
	until(ctx, t, "it is being followed", func() bool { return len(f.turn) == 0 })
	if err := f.Follow(ctx); !errors.Is(err, ErrFileBusy) {
		t.Errorf("follow: %v", err)
	}
	if _, err := f.Finish(ctx); !errors.Is(err, ErrFileBusy) {
		t.Errorf("finish: %v", err)
	}
	stop()
	if _, err := f.Finish(ctx); err != nil {
		t.Error(err)
	}
}

func TestFollowShrunkFile(t *testing.T) {
	ctx := followContext(t)
	f := created(t, openRoot(t, t.TempDir()), "m", 0)
	if _, err := f.Target().Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := f.follower.hashTo(ctx, HeaderSize+1<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Target().Truncate(HeaderSize + 5); err != nil {
		t.Fatal(err)
	}
	if sum, err := f.Finish(ctx); err == nil {
		t.Errorf("finished a file that had shrunk: %+v", sum)
	}
}
