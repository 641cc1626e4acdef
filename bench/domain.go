package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"strings"
	"text/template"
)

// domainXML describes for libvirt the guest that a command line of testvm's
// describes for QEMU.
func domainXML(emulator string, args []string) ([]byte, error) {
	d := domain{Emulator: emulator, Options: map[string]string{}}
	paths := map[string]string{} // by the id of a chardev
	for i := 1; i+1 < len(args); i++ {
		value := args[i+1]
		switch args[i] {
		case "-name", "-uuid", "-m", "-kernel", "-initrd", "-append", "-machine", "-cpu":
			d.Options[args[i][1:]] = value
		case "-chardev":
			o := options(value)
			paths[o["id"]] = o["path"]
		case "-drive":
			o := options(value)
			if o["format"] != "qcow2" {
				return nil, fmt.Errorf("disk %q is not described", value)
			}
			d.Disks = append(d.Disks, o["file"])
		case "-device":
			if o := options(value); o["chardev"] != "" {
				d.Ports = append(d.Ports, port{o["name"], paths[o["chardev"]]})
			}
		}
	}
	d.Console = paths["console"]
	var b bytes.Buffer
	err := domainTemplate.Execute(&b, d)
	return b.Bytes(), err
}

type domain struct {
	Emulator string
	Options  map[string]string // of QEMU, by their names
	Console  string
	Disks    []string
	Ports    []port
}

// port is a virtio-serial port.
type port struct{ Name, Path string }

// options returns the options of a string of QEMU's; what has no name is left
// out. Values with commas in them are not among ours.
func options(s string) map[string]string {
	o := map[string]string{}
	for part := range strings.SplitSeq(s, ",") {
		if name, value, ok := strings.Cut(part, "="); ok {
			o[name] = value
		}
	}
	return o
}

var domainTemplate = template.Must(template.New("").Funcs(template.FuncMap{
	"x": func(s string) (string, error) {
		var b strings.Builder
		err := xml.EscapeText(&b, []byte(s))
		return b.String(), err
	},
	"disk": func(i int) string { return "vd" + string(rune('a'+i)) },
}).Parse(`<domain type='qemu'>
  <name>{{x .Options.name}}</name>
  <uuid>{{x .Options.uuid}}</uuid>
  <memory unit='MiB'>{{x .Options.m}}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{{x .Options.machine}}'>hvm</type>
{{- if .Options.kernel}}
    <kernel>{{x .Options.kernel}}</kernel>
    <initrd>{{x .Options.initrd}}</initrd>
    <cmdline>{{x .Options.append}}</cmdline>
{{- end}}
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='allow'>{{x .Options.cpu}}</model></cpu>
  <devices>
    <emulator>{{x .Emulator}}</emulator>
{{- range $i, $file := .Disks}}
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{{x $file}}'/><target dev='{{disk $i}}' bus='virtio'/></disk>
{{- end}}
    <controller type='usb' model='none'/>
    <controller type='virtio-serial'/>
    <memballoon model='none'/>
{{- if .Console}}
    <serial type='file'><source path='{{x .Console}}' append='on'/></serial>
{{- end}}
{{- range .Ports}}
    <channel type='unix'><source mode='bind' path='{{x .Path}}'/><target type='virtio' name='{{x .Name}}'/></channel>
{{- end}}
  </devices>
</domain>
`))
