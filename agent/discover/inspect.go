package discover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// errBystander is ErrNotQEMU for a process that may yet turn out to run a VM.
var errBystander = fmt.Errorf("%w: it belongs to one that does", ErrNotQEMU)

// Inspect describes one process. It fails with ErrGone when it has exited, and
// with ErrNotQEMU when it runs no VM.
func Inspect(pid int) (Process, error) {
	binary, err := looksLikeQEMU(pid)
	if err != nil {
		return Process{}, err
	}
	before, err := readStat(pid)
	if err != nil {
		return Process{}, err
	}
	if before.dead() {
		return Process{}, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	args, err := readArguments(pid)
	if err != nil {
		return Process{}, err
	}
	p, err := ParseCommandLine(args)
	if err != nil {
		// It runs, so it is listed all the same; it may have overwritten its
		// arguments.
		p = Process{Args: args, Notes: []string{fmt.Sprintf("command line: %v", err)}}
	}
	if p.question {
		return Process{}, ErrNotQEMU
	}
	if isBystander(before, p.Daemonized) {
		return Process{}, errBystander
	}
	p.PID, p.StartTime, p.Binary = pid, before.startTime, binary
	p.Stopped = before.state == 'T' || before.state == 't'
	if err := p.readSurroundings(); err != nil {
		return Process{}, err
	}
	if !Same(pid, p.StartTime) {
		return Process{}, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	return p, nil
}

// readSurroundings adds what /proc tells beside the command line. What cannot
// be read is noted; only a process that has gone is an error.
func (p *Process) readSurroundings() error {
	var err error
	if p.Started, err = startedAt(p.StartTime); err != nil {
		return err
	}
	who, err := readCredentials(p.PID)
	if err != nil {
		return err
	}
	p.UID, p.GID, p.Groups = who.uid, who.gid, who.groups
	if p.Cgroup, err = readCgroup(p.PID); err != nil {
		if err = p.noteUnlessGone("control group", err); err != nil {
			return err
		}
	}
	if evidence := libvirtUnit(p.Cgroup); evidence != "" && !p.Libvirt {
		p.Libvirt, p.LibvirtEvidence = true, evidence
	}
	if err := p.noteUnlessGone("root directory", p.readRoot()); err != nil {
		return err
	}
	if err := p.noteUnlessGone("working directory", p.readCwd()); err != nil {
		return err
	}
	p.resolvePaths()
	if p.Root != "" && !p.chroot && p.sharesTree() {
		p.Root = ""
	}
	return nil
}

func (p *Process) noteUnlessGone(what string, err error) error {
	if err == nil || errors.Is(err, ErrGone) {
		return err
	}
	p.Notes = append(p.Notes, fmt.Sprintf("%s: %v", what, err))
	return nil
}

// readRoot finds out whether the process sees another file system tree: it is
// in another mount namespace, or its root is another directory. A QEMU that
// changed its root by itself did so after it had opened its files, whose names
// count from the root that it started in.
func (p *Process) readRoot() error {
	root := procPath(p.PID, "root")
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	theirs, err := os.Readlink(procPath(p.PID, "ns/mnt"))
	if err != nil {
		return gone(p.PID, err)
	}
	if theirs != own {
		p.Root = root
		if p.chroot {
			p.Notes = append(p.Notes,
				"it changed its root directory inside another mount namespace: its files cannot be reached by name")
		}
		return nil
	}
	if p.chroot {
		return nil
	}
	var here, there unix.Stat_t
	if err := unix.Stat("/", &here); err != nil {
		return fmt.Errorf("stat /: %w", err)
	}
	if err := unix.Stat(root, &there); err != nil {
		return gone(p.PID, err)
	}
	if here.Dev != there.Dev || here.Ino != there.Ino {
		p.Root = root
	}
	return nil
}

// readCwd finds the directory that relative paths start from. A QEMU that was
// daemonized, or changed its root, has left it, so its environment is asked,
// which holds it unless QEMU was started with another.
func (p *Process) readCwd() error {
	if !p.Daemonized && !p.chroot {
		cwd, err := os.Readlink(procPath(p.PID, "cwd"))
		if err != nil {
			return gone(p.PID, err)
		}
		p.Cwd = p.inside(cwd)
		return nil
	}
	env, err := os.ReadFile(procPath(p.PID, "environ"))
	if err != nil {
		return gone(p.PID, err)
	}
	for entry := range strings.SplitSeq(string(env), "\x00") {
		if pwd, ok := strings.CutPrefix(entry, "PWD="); ok && filepath.IsAbs(pwd) {
			p.Cwd = pwd
		}
	}
	return nil
}

// inside takes a chroot's own prefix off a path that the kernel reports from
// our root.
func (p *Process) inside(path string) string {
	root, err := os.Readlink(procPath(p.PID, "root"))
	if err != nil || root == "/" || p.Root == "" {
		return path
	}
	if rest, ok := strings.CutPrefix(path, root); ok && (rest == "" || rest[0] == '/') {
		return "/" + strings.TrimPrefix(rest, "/")
	}
	return path
}

// resolvePaths makes relative paths absolute and tells devices from files.
func (p *Process) resolvePaths() {
	for i := range p.QMP {
		p.QMP[i] = p.resolveSocket(p.QMP[i])
	}
	p.GuestAgent = p.resolveSocket(p.GuestAgent)
	p.PIDFile = p.absolute(p.PIDFile)
	for i := range p.Drives {
		d := &p.Drives[i]
		d.File = p.absolute(d.File)
		if d.Protocol == "file" && p.isBlockDevice(d.File) {
			d.Protocol = "host_device"
		}
	}
}

func (p *Process) resolveSocket(s Socket) Socket {
	if !s.Abstract {
		s.Path = p.absolute(s.Path)
	}
	return s
}

// absolute returns a path as it is from the root. Without a known directory a
// relative path stays one, and is noted.
func (p *Process) absolute(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	if p.Cwd == "" {
		p.Notes = append(p.Notes, fmt.Sprintf("%q is relative to an unknown directory", path))
		return path
	}
	return filepath.Join(p.Cwd, path)
}

func (p *Process) isBlockDevice(path string) bool {
	host, err := p.HostPath(path)
	if err != nil {
		return false
	}
	info, err := os.Stat(host)
	return err == nil && info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0
}
