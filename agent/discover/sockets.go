package discover

import "strings"

// guestAgentPort is the name by which qemu-ga finds its port in the guest.
const guestAgentPort = "org.qemu.guest_agent.0"

// resolveMonitors finds the sockets of the QMP monitors.
func (c *commandLine) resolveMonitors() {
	for _, m := range c.monitors {
		if s, ok := c.monitorSocket(m); ok {
			c.p.QMP = append(c.p.QMP, s)
		}
	}
}

func (c *commandLine) monitorSocket(m option) (Socket, bool) {
	if m.name == "mon" {
		if m.settings.value("mode") != "control" {
			return Socket{}, false
		}
		return c.chardevSocket(m.settings.value("chardev"))
	}
	if id, ok := strings.CutPrefix(m.arg, "chardev:"); ok {
		return c.chardevSocket(id)
	}
	address, ok := strings.CutPrefix(m.arg, "unix:")
	if !ok {
		return Socket{}, false
	}
	s, err := parseSettings(address, "path")
	if err != nil {
		c.note("-%s %s: %v", m.name, m.arg, err)
		return Socket{}, false
	}
	return listeningSocket(s)
}

// chardevSocket returns the socket on which a chardev listens. A chardev with
// several users has a multiplexer before it and the same socket.
func (c *commandLine) chardevSocket(id string) (Socket, bool) {
	s := c.chardevs[id]
	if s.value("backend") != "socket" {
		return Socket{}, false
	}
	if fd, ok := s.get("fd"); ok {
		c.note("chardev %q is the inherited descriptor %s, which has no path to connect to", id, fd)
		return Socket{}, false
	}
	socket, ok := listeningSocket(s)
	socket.Chardev = id
	return socket, ok
}

// listeningSocket returns the unix socket that the keys of a socket chardev
// describe, if QEMU listens on it. "nowait" and the like have become keys
// already.
func listeningSocket(s settings) (Socket, bool) {
	path := s.value("path")
	if path == "" || !s.on("server") {
		return Socket{}, false
	}
	abstract := s.on("abstract")
	tight, given := s.get("tight")
	return Socket{Path: path, Abstract: abstract, Loose: abstract && given && tight == "off"}, true
}

// resolveGuestAgent finds the port that the guest's agent opens.
func (c *commandLine) resolveGuestAgent() {
	for _, d := range c.devices {
		if d.value("driver") != "virtserialport" || d.value("name") != guestAgentPort {
			continue
		}
		c.p.GuestAgentDevice = d.value("id")
		socket, ok := c.chardevSocket(d.value("chardev"))
		if !ok {
			c.note("the guest-agent port is not on a unix socket that QEMU listens on")
		}
		c.p.GuestAgent = socket
		return
	}
}
