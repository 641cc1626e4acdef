package catalog

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/op"
)

var doomed = op.Spec{Kind: op.KindSnapshot, VMID: "vm1", VMName: "web", Request: map[string]string{"Name": "one"}, RequestID: "key", UID: 7}

// runForEver starts an operation, tells of what it journalled, and waits to be
// killed.
func runForEver(dir string) error {
	ctx := context.Background()
	c, err := Open(ctx, dir, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	r := op.NewRunner(c, hclog.NewNullLogger())
	rec, err := r.Start(ctx, doomed, func(ctx context.Context, o *op.Op) error {
		for _, intent := range []string{"overlay", "freeze"} {
			if err := o.Journal(ctx, intent, map[string]string{"of": o.ID()}); err != nil {
				return err
			}
		}
		fmt.Println(o.ID())
		<-ctx.Done()
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	_, err = r.Wait(ctx, rec.ID)
	return err
}

// TestOperationOutlivesItsDaemon kills a process in the middle of an operation
// and resumes the operation in another.
func TestOperationOutlivesItsDaemon(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir, childWork+"=1")
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the child said nothing")
	}
	id := lines.Text()
	check(t, cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child ended by itself")
	}

	c := openTest(t, dir)
	r := op.NewRunner(c, hclog.NewNullLogger())
	left, err := r.Operations(ctx, op.Filter{Active: true})
	check(t, err)
	if len(left) != 1 || left[0].ID != id || left[0].State != op.Running || left[0].Started.IsZero() {
		t.Fatalf("unfinished: %+v, want operation %s", left, id)
	}
	check(t, r.Resume(left[0], func(ctx context.Context, o *op.Op) error {
		entries, err := c.Journal(ctx, id)
		if err != nil {
			return err
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.Kind+string(e.Data))
		}
		same(t, "journal", got, []string{`overlay{"of":"` + id + `"}`, `freeze{"of":"` + id + `"}`})
		return o.Step(ctx, "adopt", func(context.Context) error { return nil })
	}))
	ended, err := r.Wait(ctx, id)
	check(t, err)
	if ended.State != op.Succeeded {
		t.Errorf("ended %+v", ended)
	}
	again, err := r.Start(ctx, doomed, func(context.Context, *op.Op) error {
		t.Error("a repeated request ran again")
		return nil
	})
	check(t, err)
	same(t, "the request's operation", again, ended)
	entries, err := c.Journal(ctx, id)
	check(t, err)
	same(t, "journal after the end", len(entries), 0)
	check(t, r.Shutdown(ctx))
}
