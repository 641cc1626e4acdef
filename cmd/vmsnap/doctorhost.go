package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// The codes of what is checked from here; vmsnapd checks the rest.
const (
	hostDaemon = "daemon"
	hostUnit   = "unit"
)

// checkHost asks the daemon about its host. Without a daemon it tells why there
// is none, and what can be seen from here.
func (a *app) checkHost() error {
	ctx, cancel := context.WithTimeout(a.asked, callTimeout)
	defer cancel()
	checks, err := a.hostChecks(ctx)
	if err != nil {
		return err
	}
	if err := a.print(hostResult(checks)); err != nil {
		return err
	}
	broken := 0
	for _, c := range checks {
		if c.GetState() == vmsnapv1.HostState_HOST_STATE_BROKEN {
			broken++
		}
	}
	if broken == 0 {
		return nil
	}
	return &exitError{code: vmsnapv1.ErrorCode_ERROR_CODE_FAILED, message: fmt.Sprintf("%d %s broken", broken, verb(broken))}
}

func verb(n int) string {
	if n == 1 {
		return "check is"
	}
	return "checks are"
}

func (a *app) hostChecks(ctx context.Context) ([]*vmsnapv1.HostCheck, error) {
	res, err := a.client().VMs().CheckHost(ctx, connect.NewRequest(&vmsnapv1.CheckHostRequest{}))
	if err == nil {
		served := &vmsnapv1.HostCheck{Code: hostDaemon, State: vmsnapv1.HostState_HOST_STATE_WORKS, Message: "vmsnapd answers at " + a.socket}
		return append([]*vmsnapv1.HostCheck{served}, res.Msg.GetChecks()...), nil
	}
	told, ok := client.ErrorOf(err)
	switch code := told.GetCode(); {
	case !ok:
		return nil, err
	case code != vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE && code != vmsnapv1.ErrorCode_ERROR_CODE_DENIED:
		return nil, err
	}
	return []*vmsnapv1.HostCheck{
		{Code: hostDaemon, State: vmsnapv1.HostState_HOST_STATE_BROKEN, Message: told.GetMessage(), Hint: told.GetHint()},
		unitCheck(), qemuCheck(),
	}, nil
}

// unitFiles are where a unit for vmsnapd stands.
var unitFiles = []string{"/etc/systemd/system/vmsnapd.service", "/usr/lib/systemd/system/vmsnapd.service", "/lib/systemd/system/vmsnapd.service"}

// unitCheck tells whether vmsnapd is installed.
func unitCheck() *vmsnapv1.HostCheck {
	c := &vmsnapv1.HostCheck{Code: hostUnit, State: vmsnapv1.HostState_HOST_STATE_WORKS}
	for _, file := range unitFiles {
		if _, err := os.Stat(file); err == nil {
			c.Message = file + " is installed"
			return c
		}
	}
	if path, err := exec.LookPath("vmsnapd"); err == nil {
		c.State, c.Message = vmsnapv1.HostState_HOST_STATE_LIMITED, path+" is installed, and no unit that starts it"
		c.Hint = "start it as root, or install the package"
		return c
	}
	c.State, c.Message = vmsnapv1.HostState_HOST_STATE_BROKEN, "vmsnapd is not installed on this host"
	c.Hint = "install the package; see docs/install.md"
	return c
}

// qemuCheck counts the QEMU processes that can be seen from here.
func qemuCheck() *vmsnapv1.HostCheck {
	c := &vmsnapv1.HostCheck{Code: "qemu", State: vmsnapv1.HostState_HOST_STATE_WORKS}
	links, _ := filepath.Glob("/proc/[0-9]*/comm") // the pattern is well formed
	running := 0
	for _, link := range links {
		name, err := os.ReadFile(link)
		if err == nil && (strings.HasPrefix(string(name), "qemu-system-") || strings.HasPrefix(string(name), "qemu-kvm") || string(name) == "kvm\n") {
			running++
		}
	}
	c.Message = fmt.Sprintf("QEMU processes that can be seen: %d", running)
	return c
}

// hostResult shows the checks.
func hostResult(checks []*vmsnapv1.HostCheck) result {
	r := result{document: &vmsnapv1.CheckHostResponse{Checks: checks}}
	for _, c := range checks {
		if c.GetState() != vmsnapv1.HostState_HOST_STATE_WORKS {
			r.names = append(r.names, c.GetCode())
		}
	}
	r.human = func(p page, _ bool) error {
		for _, c := range checks {
			state := word(c.GetState())
			if state == "works" {
				p.line("%s: %s", c.GetCode(), c.GetMessage())
				continue
			}
			p.line("%s: %s: %s", c.GetCode(), strings.ToUpper(state), c.GetMessage())
			if c.GetHint() != "" {
				p.line("  hint: %s", c.GetHint())
			}
		}
		return nil
	}
	return r
}
