package systemd

import (
	"errors"
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
)

// Listener returns the Unix socket on which systemd listens for the daemon, or
// nil when there is none. More than one, or another kind, is an error: requests
// would be lost on what nobody serves. The socket belongs to systemd, which
// goes on to listen when the daemon ends; closing the listener does not remove
// its name.
func Listener() (*net.UnixListener, error) {
	files := activation.Files(true)
	if len(files) == 0 {
		return nil, nil
	}
	var errs []error
	var listeners []net.Listener
	for _, file := range files {
		l, err := net.FileListener(file)
		errs = append(errs, err, file.Close())
		if err == nil {
			listeners = append(listeners, l)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("socket from systemd: %w", err)
	}
	l, ok := listeners[0].(*net.UnixListener)
	if len(listeners) != 1 || !ok {
		for _, l := range listeners {
			errs = append(errs, l.Close())
		}
		return nil, errors.Join(fmt.Errorf("socket from systemd: %d were passed, the first a %T, in the place of one Unix socket",
			len(listeners), listeners[0]), errors.Join(errs...))
	}
	return l, nil
}
