package main

import (
	"context"
	"crypto/rand"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// cloning is the command line of snapshot clone.
type cloning struct {
	vm       vmsnapv1.CloneVMRequest
	launcher string
	replace  []string
	detach   bool
}

func (a *app) snapshotClone() *cobra.Command {
	c := &cloning{}
	cmd := &cobra.Command{
		Use:   "clone VM/NAME NEW|FILE",
		Short: "Make a new VM, or a new disk, from a snapshot",
		Long: `Make a new VM, called NEW, that begins with what a snapshot holds, or with a FILE,
a path with a slash in it such as ./new.qcow2, a new disk that begins with what
the snapshot has of one.

A linked clone is made at once and takes no space at first: it lies on the
snapshot's layers, which cannot be deleted while it does, and is shown with the
snapshot. With --full the data is copied, and the clone depends on nothing.

The new VM has the origin's launch command with another name, UUID, generation id
and MAC addresses, disks, firmware variables and sockets of its own. What the two
cannot both have, such as a tap device, a display or a port, is refused by name;
--replace gives the clone something else. It is started with --start, or later by
the command in NEW.vm.json, which is made beside its first disk.

Nothing that is made may exist before, and you must be allowed to write to its
directory. What root makes belongs to the owner of the origin's own files.`,
		Example: `  vmsnap snapshot clone web/golden web2 --start
  vmsnap snapshot clone web/golden web3 --full --dir /srv/vm/web3 --replace tap0=tap3
  vmsnap snapshot clone web/golden web4 --disk root
  vmsnap snapshot clone web/golden /srv/vm/web2/root.qcow2 --disk root
  vmsnap snapshot clone web/golden ./root.qcow2 --disk root --full`,
		Args:              takes("VM/NAME", "NEW|FILE"),
		ValidArgsFunction: a.completingThenFiles(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			if c.vm.RequestId == "" {
				c.vm.RequestId = rand.Text()
			}
			c.vm.Snapshot = args[0]
			if !strings.Contains(args[1], "/") {
				return a.cloneVM(cmd, c, args[1])
			}
			return a.cloneFile(cmd, c, args[1])
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&c.vm.Disks, "disk", nil, "the `disk` to clone, may be repeated; the new VM does without the others, and has all without it")
	flags.BoolVar(&c.vm.Full, "full", false, "copy the data")
	flags.StringVar(&c.vm.Dir, "dir", "", "the `directory` that the new VM's files are made in; beside the origin's disks without it")
	flags.BoolVar(&c.vm.Start, "start", false, "start the new VM")
	flags.StringVar(&c.launcher, "launcher", "auto", "who starts it: auto, systemd, exec or external")
	flags.StringArrayVar(&c.replace, "replace", nil, "what the new VM has in the place of something of the host, as `OLD=NEW`; may be repeated")
	flags.BoolVar(&c.detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&c.vm.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id", "replace")
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeSnapshotDisks)))
	must(cmd.RegisterFlagCompletionFunc("launcher", cobra.FixedCompletions([]string{"auto", "systemd", "exec", "external"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.MarkFlagDirname("dir"))
	return cmd
}

// cloneFile makes one disk.
func (a *app) cloneFile(cmd *cobra.Command, c *cloning, file string) error {
	if len(c.vm.Disks) > 1 {
		return usage(cmd, "a file holds one disk; give --disk once, or the name of a new VM")
	}
	for _, flag := range []string{"dir", "start", "launcher", "replace"} {
		if cmd.Flags().Changed(flag) {
			return usage(cmd, "--%s is for a new VM, whose name has no slash", flag)
		}
	}
	req := &vmsnapv1.CloneDiskRequest{Snapshot: c.vm.Snapshot, Full: c.vm.Full, RequestId: c.vm.RequestId}
	if len(c.vm.Disks) == 1 {
		req.Disk = c.vm.Disks[0]
	}
	var err error
	if req.Path, err = newFile(file); err != nil {
		return err
	}
	return a.cloneDisk(req, file, c.detach)
}

// cloneVM makes a VM, and stays with it to its end.
func (a *app) cloneVM(cmd *cobra.Command, c *cloning, name string) error {
	for _, image := range []string{".qcow2", ".raw", ".img"} {
		if strings.HasSuffix(name, image) {
			return usage(cmd, "%q is not a path: write ./%s for a file here", name, name)
		}
	}
	req := &c.vm
	req.Name = name
	known := false
	if req.Launcher, known = launcherNamed(c.launcher); !known || c.launcher == "unit" {
		return usage(cmd, "--launcher %q is none of auto, systemd, exec, external", c.launcher)
	}
	if req.Launcher != 0 && !req.Start {
		return usage(cmd, "--launcher is for --start")
	}
	for _, r := range c.replace {
		old, now, ok := strings.Cut(r, "=")
		if !ok || old == "" || now == "" {
			return usage(cmd, "--replace %q is not OLD=NEW", r)
		}
		if req.Replace == nil {
			req.Replace = map[string]string{}
		}
		req.Replace[old] = now
	}
	if req.Dir != "" {
		var err error
		if req.Dir, err = newFile(req.Dir); err != nil {
			return err
		}
	}
	operation, err := a.carry(req.GetRequestId(), c.detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := a.client().Snapshots().CloneVM(ctx, connect.NewRequest(req))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetOperation(), nil
	})
	if err != nil || operation == nil {
		return err
	}
	out := operationResult(operation)
	out.human = func(p page, _ bool) error {
		state := "is made; vmsnap operation show " + operation.GetId() + " -o json has the command that starts it"
		if req.GetStart() {
			state = "is made and started"
		}
		p.line("VM %s %s.", name, state)
		if !req.GetFull() {
			p.line("It lies on %s, which is needed from now on.", req.GetSnapshot())
		}
		return nil
	}
	return a.print(out)
}

// cloneDisk makes a disk, and stays with it to its end.
func (a *app) cloneDisk(req *vmsnapv1.CloneDiskRequest, file string, detach bool) error {
	operation, err := a.carry(req.GetRequestId(), detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := a.client().Snapshots().CloneDisk(ctx, connect.NewRequest(req))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetOperation(), nil
	})
	if err != nil || operation == nil {
		return err
	}
	out := operationResult(operation)
	out.human = func(p page, _ bool) error {
		if req.GetFull() {
			p.line("%s is a copy of what %s holds.", file, req.GetSnapshot())
		} else {
			p.line("%s lies on %s, which is needed from now on.", file, req.GetSnapshot())
		}
		return nil
	}
	return a.print(out)
}

func (a *app) snapshotTemplate() *cobra.Command {
	off := false
	cmd := &cobra.Command{
		Use:   "template VM/NAME",
		Short: "Keep a snapshot from being deleted",
		Long: `Make a snapshot a template: it cannot be deleted, and no retention touches it,
until --off makes it a snapshot like others again.`,
		Example: `  vmsnap snapshot template web/golden
  vmsnap snapshot template web/golden --off`,
		Args:              takes("VM/NAME"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Snapshots().SetTemplate(ctx, connect.NewRequest(&vmsnapv1.SetTemplateRequest{Snapshot: args[0], Template: !off}))
			if err != nil {
				return err
			}
			s := res.Msg.GetSnapshot()
			return a.print(result{document: s, names: []string{snapshotName(s)}, human: func(p page, _ bool) error {
				if s.GetTemplate() {
					p.line("%s is a template, and cannot be deleted.", snapshotName(s))
				} else {
					p.line("%s is a snapshot like others.", snapshotName(s))
				}
				return nil
			}})
		},
	}
	cmd.Flags().BoolVar(&off, "off", false, "make it a snapshot like others again")
	return cmd
}
