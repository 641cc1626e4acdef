package main

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) doctor() *cobra.Command {
	repair := false
	cmd := &cobra.Command{
		Use:   "doctor VM",
		Short: "Look for what is wrong with a VM, and repair it",
		Long: `Look for what is wrong with a VM: a monitor that does not answer, disks that
cannot be snapshotted, launch paths that are not settled, a guest that is frozen
still, or that a failed save of its memory has left without leave to write.

Nothing is changed without --repair. Exits with 1 when something is left that is
wrong.`,
		Example: `  vmsnap doctor web
  vmsnap doctor web --repair`,
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(_ *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(a.asked, planTimeout)
			defer cancel()
			findings, err := a.findings(ctx, args[0], repair)
			if err != nil {
				return err
			}
			if err := a.print(findingsResult(args[0], findings)); err != nil {
				return err
			}
			left := 0
			for _, f := range findings {
				if !f.GetRepaired() {
					left++
				}
			}
			if left == 0 {
				return nil
			}
			return &exitError{code: vmsnapv1.ErrorCode_ERROR_CODE_FAILED, message: fmt.Sprintf("%s: %d %s", args[0], left, plural(left, "finding"))}
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "repair what can be repaired")
	return cmd
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

func (a *app) findings(ctx context.Context, vm string, repair bool) ([]*vmsnapv1.Finding, error) {
	if repair {
		res, err := a.client().VMs().RepairVM(ctx, connect.NewRequest(&vmsnapv1.RepairVMRequest{Vm: vm}))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetFindings(), nil
	}
	res, err := a.client().VMs().DiagnoseVM(ctx, connect.NewRequest(&vmsnapv1.DiagnoseVMRequest{Vm: vm}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetFindings(), nil
}

func findingsResult(vm string, findings []*vmsnapv1.Finding) result {
	r := result{document: &vmsnapv1.DiagnoseVMResponse{Findings: findings}}
	for _, f := range findings {
		r.names = append(r.names, f.GetCode())
	}
	r.human = func(p page, _ bool) error {
		if len(findings) == 0 {
			p.line("Nothing is wrong with %s.", vm)
		}
		for _, f := range findings {
			state := ""
			if f.GetRepaired() {
				state = "repaired: "
			}
			p.advice(f.GetCode()+": "+state+f.GetMessage(), f.GetHint())
		}
		return nil
	}
	return r
}
