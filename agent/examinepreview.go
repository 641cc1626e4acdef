package agent

import (
	"context"
	"fmt"
	"os"
	"time"
)

// findPreviewForgotten is what is found of a preview that nobody ends.
const findPreviewForgotten = "preview-forgotten"

// previewLong is how long a preview may stand before the doctor speaks of it. It is
// meant for a look, and all other changes of the VM are refused meanwhile.
const previewLong = 24 * time.Hour

// lookAtPreview looks whether somebody still wants the preview that the VM runs, and
// whether what its undo needs is there.
func (x *examination) lookAtPreview(ctx context.Context) error {
	p, open, err := x.catalog.Preview(ctx, x.vm.id)
	if err != nil || !open {
		return err
	}
	if age := time.Since(p.Opened); age > previewLong {
		x.found(ctx, Finding{
			Code:    findPreviewForgotten,
			Message: fmt.Sprintf("the VM has run a preview of %s for %s, and all other changes of it are refused", p.Snapshot, age.Truncate(time.Hour)),
			Hint:    fmt.Sprintf("keep it by vmsnap preview commit %[1]s, or go back by vmsnap preview undo %[1]s", x.vm.name()),
		}, nil)
	}
	if p.Former == nil || p.Former.Memory == nil {
		return nil
	}
	const hint = "put the file back from a backup; or keep the preview and restore the automatic snapshot of the state before, which has its disks"
	m := p.Former.Memory
	fi, err := os.Stat(m.Path)
	if err != nil {
		x.found(ctx, Finding{
			Code: findMemoryMissing, Hint: hint,
			Message: fmt.Sprintf("the preview of %s cannot be undone: the memory of the state before cannot be found: %v", p.Snapshot, err),
		}, nil)
	} else if uint64(fi.Size()) != m.Size {
		x.found(ctx, Finding{
			Code: findMemoryAltered, Hint: hint,
			Message: fmt.Sprintf("the preview of %s cannot be undone: %s has %d bytes instead of %d", p.Snapshot, m.Path, fi.Size(), m.Size),
		}, nil)
	}
	return nil
}
