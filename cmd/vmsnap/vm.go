package main

import (
	"context"
	"fmt"
	"strconv"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) vm() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "vm",
		Short: "Show the VMs of this host",
	}, a.vmList(), a.vmShow(), a.vmForget())
}

func (a *app) vmList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the VMs, running or not",
		Example: `  vmsnap vm list
  vmsnap vm list -o wide
  vmsnap vm list -o json | jq -r '.vms[] | select(.state == "running") | .name'`,
		Args:              takes(),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
			if err != nil {
				return err
			}
			if reason := res.Msg.GetDiscoveryReason(); reason != "" {
				a.complain("warning: VMs are found by scanning, with a delay of seconds: %s", reason)
			}
			if len(res.Msg.GetVms()) == 0 {
				a.complain("hint: there is no VM; vmsnap doctor --host tells what vmsnapd finds on this host")
			}
			return a.print(vmsResult(res.Msg))
		},
	}
}

func vmsResult(msg *vmsnapv1.ListVMsResponse) result {
	r := result{document: msg}
	for _, vm := range msg.GetVms() {
		r.names = append(r.names, vmName(vm))
	}
	r.human = func(p page, wide bool) error {
		header := []string{"NAME", "STATE", "AGENT", "DISKS", "SNAPSHOTS", "PROBLEMS"}
		if wide {
			header = append(header, "ID", "UUID", "PID", "QEMU", "UNIT", "OPERATION", "LAST SEEN")
		}
		rows := [][]string{header}
		for _, vm := range msg.GetVms() {
			row := []string{
				vmName(vm), vmState(vm), word(vm.GetGuestAgent().GetPresence()),
				strconv.Itoa(len(vm.GetDisks())), strconv.Itoa(int(vm.GetSnapshots())), problemCodes(vm),
			}
			if wide {
				pid := ""
				if vm.GetProcess() != nil {
					pid = strconv.Itoa(int(vm.GetProcess().GetPid()))
				}
				row = append(row, vm.GetId(), vm.GetUuid(), pid, vm.GetProcess().GetQemuVersion(),
					vm.GetProcess().GetUnit(), vm.GetOperationId(), p.ago(vm.GetLastSeen()))
			}
			rows = append(rows, row)
		}
		p.table(rows)
		return nil
	}
	return r
}

// vmName returns what to call a VM by: a launch command need not name it.
func vmName(vm *vmsnapv1.VM) string {
	if vm.GetName() != "" {
		return vm.GetName()
	}
	return vm.GetId()
}

func vmState(vm *vmsnapv1.VM) string {
	state := word(vm.GetState())
	switch {
	case vm.GetFreeze() == nil:
		return state
	case vm.GetFreeze().GetUnresolved():
		return state + ",frozen?"
	default:
		return state + ",frozen"
	}
}

func (a *app) vmShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show VM",
		Short: "Show a VM with its disks, layers and problems",
		Example: `  vmsnap vm show web
  vmsnap vm show web -o json | jq -r '.disks[].device'`,
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: args[0]}))
			if err != nil {
				return err
			}
			vm := res.Msg.GetVm()
			return a.print(result{document: vm, names: []string{vmName(vm)}, human: func(p page, _ bool) error {
				vmDetail(p, vm)
				return nil
			}})
		},
	}
}

func (a *app) vmForget() *cobra.Command {
	var release bool
	cmd := &cobra.Command{
		Use:   "forget VM",
		Short: "Remove the records of a VM that is gone",
		Long: `Remove the records of a VM that is gone, and of its snapshots. Its files stay;
those that are left are listed.`,
		Example: `  vmsnap vm forget web
  vmsnap vm forget web --release -o name`,
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().VMs().ForgetVM(ctx, connect.NewRequest(&vmsnapv1.ForgetVMRequest{Vm: args[0], Release: release}))
			if err != nil {
				return err
			}
			layers := res.Msg.GetLayers()
			return a.print(result{document: res.Msg, names: layers, human: func(p page, _ bool) error {
				p.line("%s is forgotten.", args[0])
				if len(layers) > 0 {
					p.line("Its layers are still there:")
				}
				for _, layer := range layers {
					p.line("  %s", layer)
				}
				return nil
			}})
		},
	}
	cmd.Flags().BoolVar(&release, "release", false, "also lift the write protection of its layers")
	return cmd
}

func problemCodes(vm *vmsnapv1.VM) string {
	switch problems := vm.GetProblems(); len(problems) {
	case 0:
		return ""
	case 1:
		return problems[0].GetCode()
	default:
		return fmt.Sprintf("%s +%d", problems[0].GetCode(), len(problems)-1)
	}
}
