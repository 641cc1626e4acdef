package main

import (
	"encoding/xml"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestDomainXML reads what libvirt is told back, so that a name with special
// characters is seen to survive.
func TestDomainXML(t *testing.T) {
	text, err := domainXML("/emulator", []string{
		"/qemu", "-name", "web", "-uuid", "U", "-machine", "pc", "-cpu", "qemu64", "-m", "512",
		"-kernel", "/k", "-initrd", "/i", "-append", "quiet a=<&'",
		"-chardev", "file,id=console,append=on,path=/log", "-serial", "chardev:console",
		"-device", "virtio-serial-pci,id=serial",
		"-chardev", "socket,id=beat,path=/beat.sock,server=on,wait=off", "-device", "virtserialport,id=beat-port,chardev=beat,name=org.beat",
		"-drive", "if=none,id=drive-root,file=/root.qcow2,format=qcow2", "-device", "virtio-blk-pci,id=root,drive=drive-root",
		"-drive", "if=none,id=drive-data,file=/data.qcow2,format=qcow2", "-device", "virtio-blk-pci,id=data,drive=drive-data",
	})
	if err != nil {
		t.Fatal(err)
	}
	type target struct {
		Dev  string `xml:"dev,attr"`
		Name string `xml:"name,attr"`
	}
	type source struct {
		File string `xml:"file,attr"`
		Path string `xml:"path,attr"`
	}
	type device struct {
		Source source `xml:"source"`
		Target target `xml:"target"`
	}
	var got struct {
		Name     string   `xml:"name"`
		UUID     string   `xml:"uuid"`
		Memory   string   `xml:"memory"`
		Kernel   string   `xml:"os>kernel"`
		Line     string   `xml:"os>cmdline"`
		CPU      string   `xml:"cpu>model"`
		Emulator string   `xml:"devices>emulator"`
		Disks    []device `xml:"devices>disk"`
		Ports    []device `xml:"devices>channel"`
		Serial   device   `xml:"devices>serial"`
	}
	want := got
	if err := xml.Unmarshal(text, &got); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	want.Name, want.UUID, want.Memory, want.Kernel, want.Line, want.CPU, want.Emulator = "web", "U", "512", "/k", "quiet a=<&'", "qemu64", "/emulator"
	want.Disks = []device{{source{File: "/root.qcow2"}, target{Dev: "vda"}}, {source{File: "/data.qcow2"}, target{Dev: "vdb"}}}
	want.Ports = []device{{source{Path: "/beat.sock"}, target{Name: "org.beat"}}}
	want.Serial = device{Source: source{Path: "/log"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the domain (-want +got):\n%s", diff)
	}
}

func TestDomainXMLRefusesWhatItCannotDescribe(t *testing.T) {
	_, err := domainXML("/emulator", []string{"/qemu", "-drive", "if=none,file=/root.raw,format=raw"})
	if err == nil || !strings.Contains(err.Error(), "root.raw") {
		t.Errorf("a raw disk: %v", err)
	}
}
