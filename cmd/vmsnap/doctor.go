package main

import (
	"context"
	"fmt"
	"path/filepath"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// checkup is what is asked of the doctor.
type checkup struct{ repair, deep bool }

func (a *app) doctor() *cobra.Command {
	var c checkup
	var rebuild, host bool
	var dirs []string
	cmd := &cobra.Command{
		Use:   "doctor [VM]",
		Short: "Look for what is wrong with a VM or with all, and repair it",
		Long: `Compare what vmsnapd knows of a VM with its files and with what QEMU has open:
layers that are missing, damaged or not protected, launch paths that lead
elsewhere, files that nothing accounts for, memory that is gone, and guests that
are frozen, paused or hold still for another reason. Without a VM all are looked
at.

Nothing is changed without --repair, and nothing is ever deleted: files that seem
to be of no use are moved to .vmsnap/quarantine beside them. Exits with 1 when
something is left that is wrong. See docs/doctor.md for each finding.

With --host it is the host that is looked at: the kernel, QEMU, the rights of
vmsnapd, the sockets of VMs and the file systems; what works, what is lost, and
how to fix it. That works without a vmsnapd too, as far as one can see then.

With --rebuild a catalog that was lost is made again from the manifests beside the
layers, in the directories of the disks that are known and in those of --dir.`,
		Example: `  vmsnap doctor
  vmsnap doctor web
  vmsnap doctor web --repair
  vmsnap doctor web --deep
  vmsnap doctor --host
  vmsnap doctor --rebuild --dir /srv/vm/web`,
		Args:              takes("[VM]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case host && (rebuild || len(args) > 0 || c.repair || c.deep || len(dirs) > 0):
				return usage(cmd, "--host is for the host, and goes with no VM and no other flag")
			case host:
				return a.checkHost()
			case rebuild && (len(args) > 0 || c.repair || c.deep):
				return usage(cmd, "--rebuild is for the whole catalog, and goes with --dir only")
			case rebuild:
				return a.rebuildCatalog(dirs)
			case len(dirs) > 0:
				return usage(cmd, "--dir is for --rebuild")
			}
			patients, err := a.patients(args)
			if err != nil {
				return err
			}
			left, failed := 0, 0
			for i := range patients {
				p := &patients[i]
				if err := a.examine(a.asked, c, p); err != nil {
					if len(args) > 0 || a.asked.Err() != nil {
						return err
					}
					p.skipped = err.Error() // the others are looked at all the same
					failed++
				}
				for _, f := range p.findings {
					if !f.GetRepaired() {
						left++
					}
				}
			}
			if err := a.print(patientsResult(patients, len(args) > 0)); err != nil || left+failed == 0 {
				return err
			}
			message := fmt.Sprintf("%d %s", left, plural(left, "finding"))
			if len(args) > 0 {
				message = args[0] + ": " + message
			}
			if failed > 0 {
				message += fmt.Sprintf(", and %d %s could not be looked at", failed, plural(failed, "VM"))
			}
			return &exitError{code: vmsnapv1.ErrorCode_ERROR_CODE_FAILED, message: message}
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&c.repair, "repair", false, "repair what can be repaired")
	flags.BoolVar(&c.deep, "deep", false, "also read saved memory and compare it with its checksum")
	flags.BoolVar(&host, "host", false, "look at the host: what works on it, what does not, and why")
	flags.BoolVar(&rebuild, "rebuild", false, "make a catalog that was lost again")
	flags.StringArrayVar(&dirs, "dir", nil, "with --rebuild: also look into this `directory`; may be repeated")
	must(cmd.MarkFlagDirname("dir"))
	return cmd
}

// rebuildCatalog has a lost catalog made again.
func (a *app) rebuildCatalog(dirs []string) error {
	for i, d := range dirs {
		path, err := filepath.Abs(d)
		if err != nil {
			return err
		}
		dirs[i] = path
	}
	res, err := a.client().VMs().RebuildCatalog(a.asked, connect.NewRequest(&vmsnapv1.RebuildCatalogRequest{Dirs: dirs}))
	if err != nil {
		return err
	}
	r := result{document: res.Msg}
	for _, vm := range res.Msg.GetVms() {
		r.names = append(r.names, vm.GetName())
	}
	r.human = func(p page, _ bool) error {
		if len(res.Msg.GetVms()) == 0 {
			p.line("Nothing was found that the catalog has lost.")
		}
		for _, vm := range res.Msg.GetVms() {
			p.line("%s is in the catalog again, with %d %s and %d %s.", vm.GetName(), vm.GetSnapshots(), plural(int(vm.GetSnapshots()), "snapshot"),
				vm.GetLayers(), plural(int(vm.GetLayers()), "layer"))
		}
		if len(res.Msg.GetSkipped()) > 0 {
			p.line("Left out:")
		}
		for _, s := range res.Msg.GetSkipped() {
			p.line("  %s", s)
		}
		return nil
	}
	return a.print(r)
}

// patient is a VM that is looked at.
type patient struct {
	ref, name string
	findings  []*vmsnapv1.Finding
	skipped   string
}

// patients returns the VM that is named, or all.
func (a *app) patients(args []string) ([]patient, error) {
	if len(args) > 0 {
		return []patient{{ref: args[0], name: args[0]}}, nil
	}
	ctx, cancel := context.WithTimeout(a.asked, callTimeout)
	defer cancel()
	res, err := a.client().VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
	if err != nil {
		return nil, err
	}
	var all []patient
	seen := map[string]bool{} // two processes of one identity are one VM
	for _, vm := range res.Msg.GetVms() {
		if !seen[vm.GetId()] {
			seen[vm.GetId()] = true
			all = append(all, patient{ref: vm.GetId(), name: vm.GetName()})
		}
	}
	return all, nil
}

// examine looks at one VM. It takes as long as its images are large.
func (a *app) examine(ctx context.Context, c checkup, p *patient) error {
	if c.repair {
		res, err := a.client().VMs().RepairVM(ctx, connect.NewRequest(&vmsnapv1.RepairVMRequest{Vm: p.ref, Deep: c.deep}))
		if err != nil {
			return err
		}
		p.findings = res.Msg.GetFindings()
		return nil
	}
	res, err := a.client().VMs().DiagnoseVM(ctx, connect.NewRequest(&vmsnapv1.DiagnoseVMRequest{Vm: p.ref, Deep: c.deep}))
	if err != nil {
		return err
	}
	p.findings, p.skipped = res.Msg.GetFindings(), res.Msg.GetSkipped()
	return nil
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

// patientsResult shows the findings of one VM, or of several with their names.
func patientsResult(patients []patient, one bool) result {
	r := result{}
	documents := []any{}
	for _, p := range patients {
		for _, f := range p.findings {
			name := f.GetCode()
			if !one {
				name = p.name + " " + name
			}
			r.names = append(r.names, name)
		}
		d := plain((&vmsnapv1.DiagnoseVMResponse{Findings: p.findings, Skipped: p.skipped}).ProtoReflect())
		documents = append(documents, append(object{{"vm", p.name}}, d.(object)...))
	}
	r.document = object{{"vms", documents}}
	if one {
		r.document = documents[0]
	}
	r.human = func(p page, _ bool) error {
		for _, patient := range patients {
			patient.print(p)
		}
		if len(patients) == 0 {
			p.line("There is no VM.")
		}
		return nil
	}
	return r
}

func (patient patient) print(p page) {
	switch {
	case patient.skipped != "":
		p.line("%s: its files were not looked at: %s.", patient.name, patient.skipped)
	case len(patient.findings) == 0:
		p.line("Nothing is wrong with %s.", patient.name)
	default:
		p.line("%s:", patient.name)
	}
	for _, f := range patient.findings {
		state := ""
		if f.GetRepaired() {
			state = "repaired: "
		}
		p.advice(f.GetCode()+": "+state+f.GetMessage(), f.GetHint())
	}
}
