package agent

import (
	"context"
	"errors"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// SetTemplate makes a snapshot a template, which is not deleted, or one like
// others again.
func (a *Agent) SetTemplate(ctx context.Context, ref string, template bool) (SnapshotView, error) {
	s, err := a.findSnapshot(ctx, ref)
	if err != nil {
		return SnapshotView{}, err
	}
	if err := a.catalog.SetTemplate(ctx, s.ID, template); err != nil {
		return SnapshotView{}, err
	}
	s.Template = template
	view, err := a.snapshotView(ctx, s)
	return view, errors.Join(err, a.rewriteManifests(s))
}

// checkDeletable fails for a snapshot that is to stay: a template, or one whose
// restore points clones lie on. Whoever deletes snapshots asks before anything is
// changed.
func (a *Agent) checkDeletable(ctx context.Context, s catalog.Snapshot) error {
	if s.Template {
		return fault.New(fault.Denied, "snapshot %s/%s is a template", s.VMName, s.Name).
			WithHint("vmsnap snapshot template %s/%s --off makes it a snapshot like others", s.VMName, s.Name)
	}
	for _, d := range s.Disks {
		if err := a.checkNoClones(ctx, d.LayerID); err != nil {
			return err
		}
	}
	return nil
}
