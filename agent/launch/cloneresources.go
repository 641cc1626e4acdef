package launch

import (
	"strings"

	"github.com/vmsnap/vmsnap/agent/discover"
)

// cards are the beginnings of the models of network cards. One without an address
// has the same in each VM.
var cards = []string{"virtio-net", "e1000", "rtl8139", "ne2k", "pcnet", "vmxnet3", "i82", "usb-net", "tulip", "igb", "sungem", "spapr-vlan", "lan9118", "smc91"}

func isCard(a *argument) bool {
	if _, ok := a.get("netdev"); ok {
		return true
	}
	for _, c := range cards {
		if strings.HasPrefix(a.value("driver"), c) {
			return true
		}
	}
	_, ok := a.get("mac")
	return ok
}

// device is -device.
func (r *cloning) device(arg string) (string, bool) {
	a := readArgument(arg, "driver")
	if r.gone[a.value("drive")] {
		return "", false
	}
	driver := a.value("driver")
	switch {
	case isCard(&a):
		r.address(&a, "mac")
	case driver == "vmgenid":
		a.set("guid", r.Generation)
	}
	for _, own := range []struct{ driver, key string }{
		{"vfio-", "host"}, {"vfio-", "sysfsdev"}, {"vhost-vsock", "guest-cid"}, {"vhost-user-vsock", "guest-cid"}, {"vhost-scsi", "wwpn"},
		{"usb-host", "hostbus"}, {"usb-host", "hostdevice"}, {"usb-host", "vendorid"}, {"vhost-vdpa", "vhostdev"},
		{"virtio-input-host", "evdev"}, {"pci-assign", "host"}, {"ivshmem", "shmobj"},
	} {
		if v, ok := a.get(own.key); ok && strings.HasPrefix(driver, own.driver) {
			if now := r.claim(v, "-device %s is one VM's (%s)", driver, own.key); now != v {
				a.set(own.key, now)
			}
		}
	}
	return a.String(), true
}

// address gives a network card an address.
func (r *cloning) address(a *argument, key string) {
	mac := r.MAC()
	a.set(key, mac)
	r.out.MACs = append(r.out.MACs, mac)
}

// fixed are the keys of network backends that name something of the host that one
// VM can have.
var fixed = map[string]bool{"ifname": true, "hostfwd": true, "listen": true, "localaddr": true, "vhostdev": true, "srcport": true, "udp": true}

// network is -netdev, -nic or -net.
func (r *cloning) network(o discover.Option) string {
	a := readArgument(o.Arg, "type")
	kind := a.value("type")
	if kind == "none" {
		return o.Arg
	}
	a.each(func(key, value string) string {
		if fixed[key] || key == "hostfwd.str" {
			return r.claim(value, "-%s %s", o.Name, key)
		}
		return value
	})
	local := map[string]string{"stream": "addr.", "dgram": "local."}[kind]
	if path, ok := a.get(local + "path"); ok && local != "" && (kind == "dgram" || a.on("server")) {
		a.set(local+"path", r.socketPath(path))
	} else if port, ok := a.get(local + "port"); ok && local != "" && (kind == "dgram" || a.on("server")) {
		a.set(local+"port", r.claim(port, "-%s %s listens on a port", o.Name, kind))
	}
	if o.Name == "nic" {
		r.address(&a, "mac")
	}
	if o.Name == "net" && kind == "nic" {
		r.address(&a, "macaddr")
	}
	return a.String()
}

// chardev is -chardev.
func (r *cloning) chardev(arg string) string {
	a := readArgument(arg, "backend")
	id, kind := a.value("id"), a.value("backend")
	if path, ok := a.get("logfile"); ok {
		a.set("logfile", r.made(path))
	}
	path, hasPath := a.get("path")
	port, hasPort := a.get("port")
	switch kind {
	case "socket":
		switch {
		case hasPath && a.on("server"):
			a.set("path", r.socketPath(path))
		case hasPath:
			a.set("path", r.claim(path, "chardev %s is a connection of the origin's", id))
		case hasPort && a.on("server"):
			a.set("port", r.claim(port, "chardev %s listens on a port", id))
		}
	case "file":
		a.set("path", r.made(path))
	case "pipe", "serial", "tty", "parallel", "parport":
		if hasPath {
			a.set("path", r.claim(path, "chardev %s is a device of the host", id))
		}
	case "udp":
		if local, ok := a.get("localport"); ok {
			a.set("localport", r.claim(local, "chardev %s listens on a port", id))
		}
	}
	return a.String()
}

// character is one of the options that make a character device by a short form
// (qemu_chr_parse_compat).
func (r *cloning) character(o discover.Option) string {
	prefix, arg := "", o.Arg
	if rest, ok := strings.CutPrefix(arg, "mon:"); ok {
		prefix, arg = "mon:", rest
	}
	scheme, rest, ok := strings.Cut(arg, ":")
	if !ok {
		if strings.HasPrefix(arg, "/dev/") {
			return prefix + r.claim(arg, "-%s is a device of the host", o.Name)
		}
		return o.Arg
	}
	switch scheme {
	case "unix":
		a := readArgument(rest, "path")
		path := a.value("path")
		if a.on("server") {
			a.set("path", r.socketPath(path))
		} else {
			a.set("path", r.claim(path, "-%s is a connection of the origin's", o.Name))
		}
		return prefix + "unix:" + a.String()
	case "file":
		return prefix + "file:" + r.made(rest) // commas have no meaning in it
	case "tcp", "telnet", "websocket":
		a := readArgument(rest, "address")
		if a.on("server") || o.Name == "gdb" {
			a.set("address", r.claim(a.value("address"), "-%s listens on a port", o.Name))
		}
		return prefix + scheme + ":" + a.String()
	case "udp":
		return prefix + "udp:" + r.claim(rest, "-%s may listen on a port", o.Name)
	case "pipe":
		return prefix + "pipe:" + r.claim(rest, "-%s is a pipe of the origin's", o.Name)
	}
	return o.Arg
}

// vnc is -vnc, or what -display says of it.
func (r *cloning) vnc(arg string) string {
	a := readArgument(arg, "vnc")
	address := a.value("vnc")
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		a.set("vnc", "unix:"+r.socketPath(path))
	} else if _, searches := a.get("to"); address != "none" && !searches {
		a.set("vnc", r.claim(address, "-vnc is a fixed display"))
	}
	if port, ok := a.get("websocket"); ok && port != "on" && port != "off" {
		a.set("websocket", r.claim(port, "-vnc websocket"))
	}
	return a.String()
}

// spice is -spice.
func (r *cloning) spice(arg string) string {
	a := readArgument(arg, "")
	if a.on("unix") {
		a.set("addr", r.socketPath(a.value("addr")))
		return a.String()
	}
	for _, key := range []string{"port", "tls-port"} {
		if port, ok := a.get(key); ok {
			a.set(key, r.claim(port, "-spice %s", key))
		}
	}
	return a.String()
}
