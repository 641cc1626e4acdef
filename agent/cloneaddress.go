package agent

import (
	"context"
	"crypto/rand"
	"net"
	"regexp"
	"strings"
)

// addressPattern matches MAC addresses in launch commands.
var addressPattern = regexp.MustCompile(`(?i)\b[0-9a-f]{2}([:-][0-9a-f]{2}){5}\b`)

// addresses are MAC addresses that are taken, in the way net.HardwareAddr prints
// them.
type addresses map[string]bool

// take notes all that a text holds.
func (t addresses) take(text string) {
	for _, a := range addressPattern.FindAllString(text, -1) {
		t[strings.ToLower(strings.ReplaceAll(a, "-", ":"))] = true
	}
}

// fresh returns an address that is administered locally, is that of one station,
// and is not taken (IEEE 802, 8.2).
func (t addresses) fresh() string {
	for {
		mac := make(net.HardwareAddr, 6)
		_, _ = rand.Read(mac) // never fails (crypto/rand)
		mac[0] = mac[0]&^1 | 2
		if a := mac.String(); !t[a] {
			t[a] = true
			return a
		}
	}
}

// addresses returns those of all VMs that the agent knows: in the commands of the
// running ones, and in those that snapshots hold.
func (a *Agent) addresses(ctx context.Context) (addresses, error) {
	taken := addresses{}
	a.mu.RLock()
	for _, v := range a.vms {
		v.mu.Lock()
		for _, r := range v.runs {
			for _, arg := range r.proc.Args {
				taken.take(arg)
			}
		}
		v.mu.Unlock()
	}
	a.mu.RUnlock()
	vms, err := a.catalog.VMs(ctx)
	if err != nil {
		return nil, err
	}
	for _, v := range vms {
		all, err := a.catalog.Snapshots(ctx, v.ID)
		if err != nil {
			return nil, err
		}
		for _, s := range all {
			taken.take(string(s.Config))
		}
	}
	return taken, nil
}
