package testvm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// QEMU is a version of QEMU that guests can run on.
type QEMU struct {
	Name   string   // "7.2" or "10"
	Binary string   // qemu-system-x86_64
	Img    string   // its qemu-img
	Args   []string // arguments it needs before all others, to find its data

	kernel    string
	initramfs string
}

// Tool returns the path of another program of this version, such as qemu-io.
func (q QEMU) Tool(name string) string {
	return filepath.Join(filepath.Dir(q.Img), name)
}

// ErrNoDeps means that what `make deps` provides is missing.
var ErrNoDeps = errors.New("run `make deps`")

// manifest is what hack/guest.sh writes. Paths are relative to its directory.
type manifest struct {
	Kernel string `json:"kernel"`
	QEMUs  []struct {
		Name      string   `json:"name"`
		Binary    string   `json:"binary"`
		Img       string   `json:"img"`
		Data      []string `json:"data"`
		Initramfs string   `json:"initramfs"`
	} `json:"qemus"`
}

// Versions returns the versions of QEMU to test with, the oldest first. It fails
// with ErrNoDeps if they are not there.
func Versions() ([]QEMU, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(cache, "testvm.json"))
	if err != nil {
		return nil, fmt.Errorf("find QEMU and the test guest: %w: %w", ErrNoDeps, err)
	}
	var m manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("read testvm.json: %w: %w", ErrNoDeps, err)
	}
	inCache := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(cache, path)
	}
	var versions []QEMU
	for _, v := range m.QEMUs {
		q := QEMU{
			Name:      v.Name,
			Binary:    inCache(v.Binary),
			Img:       inCache(v.Img),
			kernel:    inCache(m.Kernel),
			initramfs: inCache(v.Initramfs),
		}
		for _, dir := range v.Data {
			q.Args = append(q.Args, "-L", inCache(dir))
		}
		for _, path := range []string{q.Binary, q.Img, q.kernel, q.initramfs} {
			if _, err := os.Stat(path); err != nil {
				return nil, fmt.Errorf("find QEMU %s: %w: %w", q.Name, ErrNoDeps, err)
			}
		}
		versions = append(versions, q)
	}
	return versions, nil
}

// cacheDir returns the directory that `make deps` fills: VMSNAP_CACHE, else
// .cache at the root of the module that the process runs in.
func cacheDir() (string, error) {
	if dir := os.Getenv("VMSNAP_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".cache"), nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("find the cache: not inside the module, and VMSNAP_CACHE is not set")
		}
		dir = parent
	}
}
