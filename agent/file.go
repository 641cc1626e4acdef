package agent

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// file says which file a path leads to, in the way in which the catalog knows
// layers: a block device by what is its own, since its number may be another
// one's after a restart of the host.
type file struct {
	blockdev.FileID
	device string // empty for a file
}

// fileAt returns the file that a path leads to.
func fileAt(path string) (file, error) {
	f, err := statFile(path)
	return f.file, err
}

// is reports whether the file is that of a layer.
func (f file) is(l catalog.Layer) bool {
	if f.device != "" || l.Device != "" {
		return f.device == l.Device
	}
	return f.Dev == l.Dev && f.Ino == l.Ino
}

// identify makes the file a layer's.
func (f file) identify(l *catalog.Layer) {
	l.Dev, l.Ino, l.Device = f.Dev, f.Ino, f.device
	if f.device != "" {
		l.Dev, l.Ino = 0, 0
	}
}

// chain returns a layer with all below it, the newest first.
func (a *Agent) chain(ctx context.Context, active catalog.Layer) ([]catalog.Layer, error) {
	chain := []catalog.Layer{active}
	for l := active; l.Parent != ""; {
		var err error
		if l, err = a.catalog.Layer(ctx, l.Parent); err != nil {
			return nil, err
		}
		chain = append(chain, l)
	}
	return chain, nil
}

// in returns the layer of a chain that a file is, the zero layer when it
// is none.
func (f file) in(chain []catalog.Layer) catalog.Layer {
	for _, l := range chain {
		if f.is(l) {
			return l
		}
	}
	return catalog.Layer{}
}
