package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) operation() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "operation",
		Short: "Show, watch, pause and cancel operations",
	}, a.operationList(), a.operationShow(), a.operationWatch(), a.operationPause(), a.operationResume(), a.operationCancel())
}

func (a *app) operationList() *cobra.Command {
	var req vmsnapv1.ListOperationsRequest
	cmd := &cobra.Command{
		Use:   "list [VM]",
		Short: "List the operations on one VM or on all, the newest first",
		Example: `  vmsnap operation list
  vmsnap operation list web --active`,
		Args:              takes("[VM]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			if len(args) > 0 {
				req.Vm = args[0]
			}
			res, err := a.client().Operations().ListOperations(ctx, connect.NewRequest(&req))
			if err != nil {
				return err
			}
			return a.print(operationsResult(res.Msg))
		},
	}
	cmd.Flags().BoolVar(&req.Active, "active", false, "only those that have not ended")
	cmd.Flags().Uint32Var(&req.Limit, "limit", 100, "at most this many")
	noFiles(cmd, "limit")
	return cmd
}

func operationsResult(msg *vmsnapv1.ListOperationsResponse) result {
	r := result{document: msg}
	for _, o := range msg.GetOperations() {
		r.names = append(r.names, o.GetId())
	}
	r.human = func(p page, wide bool) error {
		header := []string{"ID", "KIND", "VM", "STATE", "PROGRESS", "TOOK", "CREATED"}
		if wide {
			header = append(header, "UID", "REQUEST ID", "SNAPSHOT", "WARNINGS", "ERROR")
		}
		rows := [][]string{header}
		for _, o := range msg.GetOperations() {
			row := []string{
				o.GetId(), o.GetKind(), operationVM(o), operationState(o), progressText(o.GetProgress()),
				took(o, p.now), p.ago(o.GetCreated()),
			}
			if wide {
				row = append(row, strconv.Itoa(int(o.GetUid())), o.GetRequestId(), o.GetSnapshotId(),
					warningCodes(o.GetWarnings()), o.GetError().GetMessage())
			}
			rows = append(rows, row)
		}
		p.table(rows)
		return nil
	}
	return r
}

func operationVM(o *vmsnapv1.Operation) string {
	if o.GetVmName() != "" {
		return o.GetVmName()
	}
	return o.GetVmId()
}

func operationState(o *vmsnapv1.Operation) string {
	if n := o.GetQueuePosition(); n > 0 {
		return fmt.Sprintf("%s,%d", word(o.GetState()), n)
	}
	switch {
	case o.GetPartial():
		return word(o.GetState()) + ",partial"
	case o.GetPaused():
		return word(o.GetState()) + ",paused"
	}
	return word(o.GetState())
}

func progressText(p *vmsnapv1.Progress) string {
	switch {
	case p.GetTotal() == 0:
		return ""
	case p.GetUnit() == "bytes":
		return size(p.GetDone()) + " of " + size(p.GetTotal())
	default:
		return fmt.Sprintf("%d/%d %s", p.GetDone(), p.GetTotal(), p.GetUnit())
	}
}

// took returns how long an operation has run, up to its end or now.
func took(o *vmsnapv1.Operation, now time.Time) string {
	if o.GetStarted() == nil {
		return ""
	}
	end := now
	if o.GetEnded() != nil {
		end = o.GetEnded().AsTime()
	}
	return brief(max(end.Sub(o.GetStarted().AsTime()), 0))
}

func (a *app) operationShow() *cobra.Command {
	return &cobra.Command{
		Use:               "show ID",
		Short:             "Show an operation with its steps",
		Example:           `  vmsnap operation show c0ffee01`,
		Args:              takes("ID"),
		ValidArgsFunction: a.completing(a.completeOperations(false)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Operations().GetOperation(ctx, connect.NewRequest(&vmsnapv1.GetOperationRequest{Id: args[0]}))
			if err != nil {
				return err
			}
			return a.print(operationResult(res.Msg.GetOperation()))
		},
	}
}

func operationResult(o *vmsnapv1.Operation) result {
	return result{document: o, names: []string{o.GetId()}, human: func(p page, _ bool) error {
		operationDetail(p, o)
		return nil
	}}
}

func operationDetail(p page, o *vmsnapv1.Operation) {
	p.fields(
		"ID", o.GetId(),
		"Kind", o.GetKind(),
		"VM", operationVM(o),
		"State", operationState(o),
		"Waits for", o.GetQueueReason(),
		"Progress", progressText(o.GetProgress()),
		"Created", p.when(o.GetCreated()),
		"Took", took(o, p.now),
		"UID", strconv.Itoa(int(o.GetUid())),
		"Request ID", o.GetRequestId(),
		"Snapshot", o.GetSnapshotId(),
		"Error", o.GetError().GetMessage(),
		"Hint", o.GetError().GetHint(),
	)
	if len(o.GetSteps()) > 0 {
		p.line("")
		p.line("Steps:")
	}
	var rows [][]string
	for _, s := range o.GetSteps() {
		mark, note := "✓", ""
		switch {
		case s.GetError() != "":
			mark, note = "✗", s.GetError()
		case s.GetEnded() == nil:
			mark, note = "…", "running"
		}
		row := []string{mark + " " + s.GetName(), stepTook(s, p.now)}
		if note != "" {
			row = append(row, note)
		}
		rows = append(rows, row)
	}
	p.columns("  ", rows)
	for _, s := range o.GetSteps() {
		if s.GetOutput() == "" {
			continue
		}
		p.line("")
		p.line("Output of %s:", s.GetName())
		for line := range strings.Lines(s.GetOutput()) {
			p.line("  %s", strings.TrimRight(line, "\n"))
		}
	}
	warningList(p, o.GetWarnings())
}

func stepTook(s *vmsnapv1.Step, now time.Time) string {
	end := now
	if s.GetEnded() != nil {
		end = s.GetEnded().AsTime()
	}
	return brief(max(end.Sub(s.GetStarted().AsTime()), 0))
}

func (a *app) operationWatch() *cobra.Command {
	return &cobra.Command{
		Use:   "watch ID",
		Short: "Stay with an operation until it ends",
		Long: `Stay with an operation until it ends, over restarts of the daemon, then show it.
The exit code is the operation's own.

Ctrl-C ends the watching and leaves the operation alone.`,
		Example:           `  vmsnap operation watch "$(vmsnap snapshot create web --detach -o name)"`,
		Args:              takes("ID"),
		ValidArgsFunction: a.completing(a.completeOperations(true)),
		RunE: func(cmd *cobra.Command, args []string) error {
			daemon := a.client()
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			// Asked first, so that a daemon that is away is told of at once.
			res, err := daemon.Operations().GetOperation(ctx, connect.NewRequest(&vmsnapv1.GetOperationRequest{Id: args[0]}))
			if err != nil {
				return err
			}
			operation, err := a.watch(a.asked, daemon, res.Msg.GetOperation())
			if _, failed := errors.AsType[*client.OperationError](err); err != nil && !failed {
				return err
			}
			a.warn(operation.GetWarnings())
			if err := errors.Join(a.print(operationResult(operation)), err); err != nil {
				return err
			}
			if operation.GetPartial() {
				return &exitError{
					code:    vmsnapv1.ErrorCode_ERROR_CODE_PARTIAL,
					message: fmt.Sprintf("operation %s was done in part", operation.GetId()),
				}
			}
			return nil
		},
	}
}

func (a *app) operationCancel() *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Cancel an operation",
		Long: `Cancel an operation. The command returns when the cancel is acknowledged; what
was done is then undone, which "vmsnap operation watch" stays with. One that is
past its point of no return completes, and the exit code is 9.`,
		Example:           `  vmsnap operation cancel c0ffee01`,
		Args:              takes("ID"),
		ValidArgsFunction: a.completing(a.completeOperations(true)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), cancelTimeout)
			defer cancel()
			res, err := a.client().Operations().CancelOperation(ctx, connect.NewRequest(&vmsnapv1.CancelOperationRequest{Id: args[0]}))
			if err != nil {
				return err
			}
			return a.print(standingResult(res.Msg.GetOperation()))
		},
	}
}

// standingResult says how an operation stands now.
func standingResult(o *vmsnapv1.Operation) result {
	r := operationResult(o)
	r.human = func(p page, _ bool) error {
		p.line("operation %s is %s", o.GetId(), operationState(o))
		return nil
	}
	return r
}

func (a *app) operationPause() *cobra.Command {
	return &cobra.Command{
		Use:   "pause ID",
		Short: "Let an operation rest",
		Long: `Let an operation rest that moves data for long, such as a deletion of snapshots,
until "vmsnap operation resume". It stays paused over restarts of the daemon, and
its VM is held for it meanwhile. Operations that cannot rest say so; the exit code
is 14.`,
		Example:           `  vmsnap operation pause c0ffee01`,
		Args:              takes("ID"),
		ValidArgsFunction: a.completing(a.completeOperations(true)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Operations().PauseOperation(ctx, connect.NewRequest(&vmsnapv1.PauseOperationRequest{Id: args[0]}))
			if err != nil {
				return err
			}
			return a.print(standingResult(res.Msg.GetOperation()))
		},
	}
}

func (a *app) operationResume() *cobra.Command {
	return &cobra.Command{
		Use:               "resume ID",
		Short:             "Let a paused operation go on",
		Example:           `  vmsnap operation resume c0ffee01`,
		Args:              takes("ID"),
		ValidArgsFunction: a.completing(a.completeOperations(true)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Operations().ResumeOperation(ctx, connect.NewRequest(&vmsnapv1.ResumeOperationRequest{Id: args[0]}))
			if err != nil {
				return err
			}
			return a.print(standingResult(res.Msg.GetOperation()))
		},
	}
}
