package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// moduleDir holds the kernel modules. moduleList names those to load, in their
// order, one a line; a line's second word is what of wire.WithParameter the
// module is for, if it is not for every guest.
const (
	moduleDir  = "/modules/"
	moduleList = moduleDir + "list"
)

// parameters are what the host tells the guest on the kernel command line.
type parameters struct {
	mounts []string // labels of the file systems to mount
	with   []string // what the guest has beyond the ordinary
}

func readParameters() (parameters, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return parameters{}, err
	}
	var p parameters
	for word := range strings.FieldsSeq(string(line)) {
		if labels, ok := strings.CutPrefix(word, wire.MountsParameter); ok {
			p.mounts = strings.Split(labels, ",")
		}
		if with, ok := strings.CutPrefix(word, wire.WithParameter); ok {
			p.with = strings.Split(with, ",")
		}
	}
	return p, nil
}

func mountKernel() error {
	for _, m := range []struct{ source, target, fs string }{
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
		{"devtmpfs", "/dev", "devtmpfs"},
		{"tmpfs", "/run", "tmpfs"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.source, m.target, m.fs, unix.MS_NOSUID, "")
		if err != nil && !errors.Is(err, unix.EBUSY) { // the kernel may have mounted /dev
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

func loadModules(params parameters) error {
	list, err := os.ReadFile(moduleList)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		words := strings.Fields(line)
		if len(words) > 1 && !slices.Contains(params.with, words[1]) {
			continue
		}
		if err := loadModule(words[0]); err != nil {
			return fmt.Errorf("load %s: %w", words[0], err)
		}
	}
	return nil
}

func loadModule(name string) error {
	f, err := os.Open(moduleDir + name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil // a guest with two kinds of disks lists it twice
	}
	return err
}
