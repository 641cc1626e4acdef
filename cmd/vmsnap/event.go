package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmsnap/vmsnap/agent/event"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) event() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "event",
		Short: "Show and watch what happens on this host",
	}, a.eventList(), a.eventWatch())
}

// severity is how grave events are at least. It is a flag's value.
type severity string

var severityValues = map[severity]vmsnapv1.EventSeverity{
	"info":    vmsnapv1.EventSeverity_EVENT_SEVERITY_INFO,
	"warning": vmsnapv1.EventSeverity_EVENT_SEVERITY_WARNING,
	"error":   vmsnapv1.EventSeverity_EVENT_SEVERITY_ERROR,
}

// Set takes one of the words.
func (s *severity) Set(word string) error {
	if _, ok := severityValues[severity(word)]; !ok {
		return fmt.Errorf("%q is none of info, warning, error", word)
	}
	*s = severity(word)
	return nil
}

// String returns the word.
func (s *severity) String() string { return string(*s) }

// Type returns what the help shows for the value.
func (s *severity) Type() string { return "severity" }

// eventChoice are the flags that choose events.
type eventChoice struct {
	kinds     []string
	severity  severity
	operation string
	schedule  string
}

func (c *eventChoice) flags(a *app, cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&c.kinds, "kind", nil, "only this `kind` of event; may be repeated")
	flags.Var(&c.severity, "severity", "only those that are at least so grave: info, warning or error")
	flags.StringVar(&c.operation, "operation", "", "only those of this operation (`id`)")
	flags.StringVar(&c.schedule, "schedule", "", "only those of this `schedule`")
	must(cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(eventKinds(), cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("severity", cobra.FixedCompletions([]string{"info", "warning", "error"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("operation", a.completing(func(ctx context.Context, _ []string) []string {
		return a.completeOperations(false)(ctx, nil)
	})))
	noFiles(cmd, "schedule")
}

func eventKinds() []string {
	kinds := make([]string, len(event.Kinds))
	for i, k := range event.Kinds {
		kinds[i] = string(k)
	}
	return kinds
}

// filter returns what the flags choose, of one VM if it is named.
func (c *eventChoice) filter(cmd *cobra.Command, args []string) (*vmsnapv1.EventFilter, error) {
	for _, k := range c.kinds {
		if !slices.Contains(eventKinds(), k) {
			return nil, usage(cmd, "there is no kind of event %q: there are %s", k, strings.Join(eventKinds(), ", "))
		}
	}
	f := &vmsnapv1.EventFilter{Kinds: c.kinds, Severity: severityValues[c.severity], OperationId: c.operation, Schedule: c.schedule}
	if len(args) > 0 {
		f.Vm = args[0]
	}
	return f, nil
}

// sinceFlag is the number after which events are wanted, which may be left out.
func sinceFlag(cmd *cobra.Command, since *uint64, words string) {
	cmd.Flags().Uint64Var(since, "since", 0, words)
	noFiles(cmd, "since")
}

func given(cmd *cobra.Command, since uint64) *uint64 {
	if !cmd.Flags().Changed("since") {
		return nil
	}
	return proto.Uint64(since)
}

func (a *app) eventList() *cobra.Command {
	var choice eventChoice
	var since uint64
	var within time.Duration
	var req vmsnapv1.ListEventsRequest
	cmd := &cobra.Command{
		Use:   "list [VM]",
		Short: "List what happened, to one VM or at all, the newest first",
		Example: `  vmsnap event list
  vmsnap event list web --severity warning --within 24h
  vmsnap event list --kind operation-ended -o json`,
		Args:              takes("[VM]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if req.Filter, err = choice.filter(cmd, args); err != nil {
				return err
			}
			if within < 0 {
				return usage(cmd, "--within must be more than zero")
			}
			if within > 0 {
				req.Filter.After = timestamppb.New(a.now().Add(-within))
			}
			req.Since = given(cmd, since)
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Events().ListEvents(ctx, connect.NewRequest(&req))
			if err != nil {
				return err
			}
			if req.Since != nil && since+1 < res.Msg.GetFirstSeq() {
				a.complain("warning: the events from %d to %d are forgotten", since+1, res.Msg.GetFirstSeq()-1)
			}
			return a.print(eventsResult(res.Msg))
		},
	}
	choice.flags(a, cmd)
	sinceFlag(cmd, &since, "only those with a greater number")
	cmd.Flags().DurationVar(&within, "within", 0, "only those of the last so many hours, for example 24h")
	cmd.Flags().Uint32Var(&req.Limit, "limit", 100, "at most this many")
	noFiles(cmd, "limit", "within")
	return cmd
}

func eventsResult(msg *vmsnapv1.ListEventsResponse) result {
	r := result{document: msg}
	for _, e := range msg.GetEvents() {
		r.names = append(r.names, strconv.FormatUint(e.GetSeq(), 10))
	}
	r.human = func(p page, wide bool) error {
		header := []string{"SEQ", "WHEN", "SEVERITY", "KIND", "VM", "MESSAGE"}
		if wide {
			header = []string{"SEQ", "TIME", "SEVERITY", "KIND", "VM", "OPERATION", "SNAPSHOT", "SCHEDULE", "UID", "CODE", "RESULT", "MESSAGE"}
		}
		rows := [][]string{header}
		for _, e := range msg.GetEvents() {
			row := []string{strconv.FormatUint(e.GetSeq(), 10), p.ago(e.GetTime()), word(e.GetSeverity()), e.GetKind(), eventVM(e), eventMessage(e)}
			if wide {
				row = []string{
					strconv.FormatUint(e.GetSeq(), 10), eventTime(e), word(e.GetSeverity()), e.GetKind(), eventVM(e), e.GetOperationId(),
					e.GetSnapshotId(), e.GetSchedule(), eventUID(e), e.GetCode(), e.GetResult(), eventMessage(e),
				}
			}
			rows = append(rows, row)
		}
		p.table(rows)
		return nil
	}
	return r
}

func eventTime(e *vmsnapv1.Event) string {
	return e.GetTime().AsTime().Format("2006-01-02 15:04:05 UTC")
}

// eventVM returns what to call the VM of an event by.
func eventVM(e *vmsnapv1.Event) string {
	if e.GetVmName() != "" {
		return e.GetVmName()
	}
	return e.GetVmId()
}

func eventUID(e *vmsnapv1.Event) string {
	if e.Uid == nil {
		return ""
	}
	return strconv.FormatUint(uint64(e.GetUid()), 10)
}

func eventMessage(e *vmsnapv1.Event) string {
	if e.GetDisk() != "" {
		return "disk " + e.GetDisk() + ": " + e.GetMessage()
	}
	return e.GetMessage()
}

func (a *app) eventWatch() *cobra.Command {
	var choice eventChoice
	var since uint64
	var count int
	cmd := &cobra.Command{
		Use:   "watch [VM]",
		Short: "Print what happens, as it happens",
		Long: `Print what happens to one VM or at all, one event a line, until Ctrl-C. With
--since it begins with what came after an event that was seen; with --since 0,
with all that is kept. Over a restart of the daemon it goes on where it was.

If events between were forgotten, a warning says which. With -o json and yaml
each event is a document of its own, in JSON on one line.`,
		Example: `  vmsnap event watch
  vmsnap event watch --since 1042 -o json
  vmsnap event watch web --severity error`,
		Args:              takes("[VM]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			filter, err := choice.filter(cmd, args)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("count") && count <= 0 {
				return usage(cmd, "--count must be more than zero")
			}
			return a.watchEvents(&vmsnapv1.WatchEventsRequest{Filter: filter, Since: given(cmd, since)}, count)
		},
	}
	choice.flags(a, cmd)
	sinceFlag(cmd, &since, "begin after this number (default: with what comes from now on)")
	cmd.Flags().IntVar(&count, "count", 0, "end after this many events")
	noFiles(cmd, "count")
	return cmd
}

// errEnough ends a watch that has seen what it wanted.
var errEnough = fmt.Errorf("enough events were seen")

// watchEvents prints events, so many of them if count is not 0.
func (a *app) watchEvents(req *vmsnapv1.WatchEventsRequest, count int) error {
	seen := 0
	err := a.client().WatchEvents(a.asked, req, func(news *vmsnapv1.WatchEventsResponse) error {
		if gap := news.GetGap(); gap != nil {
			a.complain("warning: the events from %d to %d are forgotten", gap.GetFromSeq(), gap.GetToSeq())
			return nil
		}
		if err := a.printEvent(news.GetEvent()); err != nil {
			return err
		}
		if seen++; seen == count {
			return errEnough
		}
		return nil
	})
	if err == errEnough {
		return nil
	}
	return err
}

// printEvent prints one event of a stream.
func (a *app) printEvent(e *vmsnapv1.Event) error {
	switch a.format {
	case formatJSON:
		text, err := marshal(plain(e.ProtoReflect()))
		if err != nil {
			return fmt.Errorf("print as JSON: %w", err)
		}
		_, err = a.stdout.Write(append(text, '\n'))
		return err
	case formatYAML:
		if _, err := fmt.Fprintln(a.stdout, "---"); err != nil {
			return err
		}
	}
	return a.print(result{document: e, names: []string{strconv.FormatUint(e.GetSeq(), 10)}, human: func(p page, wide bool) error {
		cells := []string{eventTime(e), strconv.FormatUint(e.GetSeq(), 10), word(e.GetSeverity()), e.GetKind()}
		for _, part := range []string{eventVM(e), eventMessage(e)} {
			if part != "" {
				cells = append(cells, part)
			}
		}
		line := strings.Join(cells, "  ")
		if wide {
			for _, more := range [][2]string{
				{"operation", e.GetOperationId()}, {"snapshot", e.GetSnapshotId()}, {"schedule", e.GetSchedule()},
				{"uid", eventUID(e)}, {"code", e.GetCode()}, {"result", e.GetResult()},
			} {
				if more[1] != "" {
					line += "  " + more[0] + "=" + more[1]
				}
			}
		}
		p.line("%s", line)
		return nil
	}})
}
