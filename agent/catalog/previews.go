package catalog

import (
	"context"
	"encoding/json"
	"time"
)

// Preview is a trial state that a VM runs until it is committed or undone.
type Preview struct {
	VMID      string          `json:"-"`
	Operation string          `json:"operation"` // that opened it
	Snapshot  string          `json:"snapshot"`  // name of what is previewed
	Opened    time.Time       `json:"opened"`    // when the state before ended
	Isolated  bool            `json:"isolated"`  // its network links are down
	Offline   bool            `json:"offline"`   // the state before ended by a shutdown that was witnessed
	Disks     []PreviewDisk   `json:"disks"`
	Config    json.RawMessage `json:"config"`           // the VM's configuration before
	Former    *PreviewFormer  `json:"former,omitempty"` // when it was opened in another QEMU process than the state before
}

// PreviewFormer is the QEMU process that was ended to open a preview.
type PreviewFormer struct {
	Ran      bool         `json:"ran"`                // there was one
	Memory   *SavedMemory `json:"memory,omitempty"`   // what its guest had, when it was saved
	Launcher string       `json:"launcher,omitempty"` // that was asked for
}

// PreviewDisk is one disk that a preview has changed.
type PreviewDisk struct {
	DiskID string `json:"disk"`
	Device string `json:"device"`
	Before string `json:"before"` // id of the layer that was active
	Trial  string `json:"trial"`  // id of the layer that is thrown away by undo
	Size   uint64 `json:"size"`   // virtual size before, bytes
}

// Preview returns the preview that a VM runs; ok is false when it runs none.
func (r reader) Preview(ctx context.Context, vmID string) (p Preview, ok bool, err error) {
	text, ok, err := queryOne(ctx, r, scanValue[string], "SELECT data FROM previews WHERE vm = ?", vmID)
	if err != nil || !ok {
		return Preview{}, false, err
	}
	p.VMID = vmID
	return p, true, json.Unmarshal([]byte(text), &p)
}

// PutPreview records the preview that a VM runs from now on.
func (tx *Tx) PutPreview(ctx context.Context, p Preview) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = tx.exec(ctx, "INSERT INTO previews (vm, data) VALUES (?, ?) ON CONFLICT (vm) DO UPDATE SET data = excluded.data", p.VMID, string(data))
	return err
}

// DeletePreview records that a VM runs no preview any more.
func (tx *Tx) DeletePreview(ctx context.Context, vmID string) error {
	_, err := tx.exec(ctx, "DELETE FROM previews WHERE vm = ?", vmID)
	return err
}
