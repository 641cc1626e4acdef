package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// chosen are the flags of a schedule.
type chosen struct {
	creation                          // the options of its snapshots
	name, selector, nameTemplate      string
	once, weekly, monthly, cron, zone string
	hourly, daily                     bool
	hour, minute, second              uint32
	jitter                            time.Duration
	missed, overlap                   string
	last, hours, days, weeks, months  uint32
	years                             uint32
	maxAge, maxSpace                  string
}

// kindFlags are those of which one says how a timing is told.
var kindFlags = []string{"once", "hourly", "daily", "weekly", "monthly", "cron"}

func (c *chosen) flags(a *app, cmd *cobra.Command) {
	c.options(a, cmd)
	f := cmd.Flags()
	f.StringVar(&c.name, "name", "", "the schedule's `name` (default: made of the VM and the kind of schedule)")
	f.StringVar(&c.selector, "selector", "", "all VMs whose names match this `pattern`, such as 'web-*'; also those to come")
	f.StringVar(&c.once, "once", "", "once, at this `time` (2026-03-14T02:30:00Z)")
	f.BoolVar(&c.hourly, "hourly", false, "every hour, at --minute and --second")
	f.BoolVar(&c.daily, "daily", false, "every day, at --hour, --minute and --second")
	f.StringVar(&c.weekly, "weekly", "", "on these `weekdays`, such as mon,fri")
	f.StringVar(&c.monthly, "monthly", "", "on this `day` of the month, 1 to 31 or last; a month that is too short has it on its last")
	f.StringVar(&c.cron, "cron", "", "by a cron `expression`: minute hour day month weekday; L is the last day")
	f.StringVar(&c.zone, "zone", "", "time `zone`, such as Europe/Berlin (default UTC)")
	f.Uint32Var(&c.hour, "hour", 0, "hour of the day")
	f.Uint32Var(&c.minute, "minute", 0, "minute of the hour")
	f.Uint32Var(&c.second, "second", 0, "second of the minute")
	f.DurationVar(&c.jitter, "jitter", 0, "put runs off by up to this, each VM's always by the same")
	f.StringVar(&c.missed, "missed", "catch-up", "missed runs: catch-up (once for all) or skip")
	f.StringVar(&c.overlap, "overlap", "wait", "a run whose VM is busy: wait or skip")
	f.StringVar(&c.nameTemplate, "name-template", "", "of the snapshots' names, with {{.VM}}, {{.Schedule}}, {{.Time}}, {{.Date}}, {{.Weekday}} (default \"{{.Schedule}}-{{.Time}}\")")
	f.Uint32Var(&c.last, "keep-last", 0, "keep the newest so many snapshots")
	f.Uint32Var(&c.hours, "keep-hourly", 0, "keep the newest of each of so many hours")
	f.Uint32Var(&c.days, "keep-daily", 0, "keep the newest of each of so many days")
	f.Uint32Var(&c.weeks, "keep-weekly", 0, "keep the newest of each of so many weeks")
	f.Uint32Var(&c.months, "keep-monthly", 0, "keep the newest of each of so many months")
	f.Uint32Var(&c.years, "keep-yearly", 0, "keep the newest of each of so many years")
	f.StringVar(&c.maxAge, "max-age", "", "keep none that is older than this `age`, such as 30d or 12h")
	f.StringVar(&c.maxSpace, "max-space", "", "keep no more than this `size` together, such as 100GiB")
	noFiles(cmd, "name", "selector", "once", "zone", "cron", "hour", "minute", "second", "jitter", "name-template", "keep-last", "keep-hourly",
		"keep-daily", "keep-weekly", "keep-monthly", "keep-yearly", "max-age", "max-space")
	for flag, words := range map[string][]string{
		"missed": {"catch-up", "skip"}, "overlap": {"wait", "skip"}, "weekly": {"mon", "tue", "wed", "thu", "fri", "sat", "sun"}, "monthly": {"1", "15", "last"},
	} {
		must(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)))
	}
}

// apply changes what the command line gives of a schedule.
func (c *chosen) apply(cmd *cobra.Command, spec *vmsnapv1.ScheduleSpec) error {
	if err := c.take(cmd); err != nil {
		return err
	}
	if spec.Snapshot == nil {
		spec.Snapshot = &vmsnapv1.CreateSnapshotRequest{}
	}
	if spec.Timing == nil {
		spec.Timing = &vmsnapv1.Timing{}
	}
	for name, set := range map[string]func(){
		"name": func() { spec.Name = c.name }, "selector": func() { spec.Selector, spec.Vm = c.selector, "" },
		"name-template": func() { spec.NameTemplate = c.nameTemplate }, "jitter": func() { spec.Jitter = optional(c.jitter) },
		"zone": func() { spec.Timing.Zone = c.zone }, "hour": func() { spec.Timing.Hour = c.hour },
		"minute": func() { spec.Timing.Minute = c.minute }, "second": func() { spec.Timing.Second = c.second },
	} {
		if cmd.Flags().Changed(name) {
			set()
		}
	}
	c.applyOptions(cmd, spec.Snapshot)
	if err := c.applyPolicies(cmd, spec); err != nil {
		return err
	}
	if err := c.applyTiming(cmd, spec.Timing); err != nil {
		return err
	}
	return c.applyRetention(cmd, spec)
}

// applyOptions changes the options that were given of the snapshots.
func (c *chosen) applyOptions(cmd *cobra.Command, into *vmsnapv1.CreateSnapshotRequest) {
	fields := map[string]string{
		"disk": "disks", "exclude": "exclude", "quiesce": "quiesce", "memory": "memory", "memory-strategy": "memory_strategy",
		"max-pause": "max_pause", "compress": "compress", "profile": "profile", "description": "description", "label": "labels", "strict": "strict",
		"allow-partial": "allow_partial", "mountpoint": "mountpoints", "freeze-timeout": "freeze_timeout", "lease": "lease",
	}
	from, to := c.req.ProtoReflect(), into.ProtoReflect()
	for flag, field := range fields {
		if !cmd.Flags().Changed(flag) {
			continue
		}
		fd := from.Descriptor().Fields().ByTextName(field)
		if from.Has(fd) {
			to.Set(fd, from.Get(fd))
		} else {
			to.Clear(fd)
		}
	}
}

func (c *chosen) applyPolicies(cmd *cobra.Command, spec *vmsnapv1.ScheduleSpec) error {
	missed, known := map[string]vmsnapv1.Missed{"catch-up": vmsnapv1.Missed_MISSED_CATCH_UP, "skip": vmsnapv1.Missed_MISSED_SKIP}[c.missed]
	if !known {
		return usage(cmd, "--missed is %q, and neither catch-up nor skip", c.missed)
	}
	overlap, known := map[string]vmsnapv1.Overlap{"wait": vmsnapv1.Overlap_OVERLAP_WAIT, "skip": vmsnapv1.Overlap_OVERLAP_SKIP}[c.overlap]
	if !known {
		return usage(cmd, "--overlap is %q, and neither wait nor skip", c.overlap)
	}
	if cmd.Flags().Changed("missed") || spec.Missed == 0 {
		spec.Missed = missed
	}
	if cmd.Flags().Changed("overlap") || spec.Overlap == 0 {
		spec.Overlap = overlap
	}
	return nil
}

// applyTiming changes how the timing is told, if that was given.
func (c *chosen) applyTiming(cmd *cobra.Command, t *vmsnapv1.Timing) error {
	var kinds []string
	for _, name := range kindFlags {
		if cmd.Flags().Changed(name) {
			kinds = append(kinds, name)
		}
	}
	switch {
	case len(kinds) > 1:
		return usage(cmd, "--%s and --%s exclude each other", kinds[0], kinds[1])
	case len(kinds) == 1:
		t.Kind = vmsnapv1.ScheduleKind(vmsnapv1.ScheduleKind_value["SCHEDULE_KIND_"+strings.ToUpper(kinds[0])])
		t.At, t.Cron, t.Weekdays, t.Day = nil, c.cron, nil, 0
	case t.Kind == 0:
		return usage(cmd, "when is not given: --%s", strings.Join(kindFlags, ", --"))
	}
	for _, name := range []string{"hour", "minute", "second"} {
		if cmd.Flags().Changed(name) && !hasClock(t.GetKind(), name) {
			return usage(cmd, "--%s is not for a schedule that is %s", name, word(t.GetKind()))
		}
	}
	if !hasClock(t.GetKind(), "hour") {
		t.Hour = 0
	}
	if !hasClock(t.GetKind(), "minute") {
		t.Minute, t.Second = 0, 0
	}
	return c.applyKind(cmd, t)
}

// hasClock reports whether a kind of timing has an hour, or a minute and second.
func hasClock(kind vmsnapv1.ScheduleKind, name string) bool {
	switch kind {
	case vmsnapv1.ScheduleKind_SCHEDULE_KIND_ONCE, vmsnapv1.ScheduleKind_SCHEDULE_KIND_CRON:
		return false
	case vmsnapv1.ScheduleKind_SCHEDULE_KIND_HOURLY:
		return name != "hour"
	default:
		return true
	}
}

func (c *chosen) applyKind(cmd *cobra.Command, t *vmsnapv1.Timing) error {
	switch {
	case cmd.Flags().Changed("once"):
		at, err := time.Parse(time.RFC3339, c.once)
		if err != nil {
			return usage(cmd, "--once %q is not a time such as 2026-03-14T02:30:00Z or 2026-03-14T02:30:00+01:00", c.once)
		}
		t.At = timestamppb.New(at)
	case cmd.Flags().Changed("weekly"):
		for name := range strings.SplitSeq(c.weekly, ",") {
			i := slices.Index([]string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}, strings.ToLower(name))
			if i < 0 {
				return usage(cmd, "--weekly: %q is none of mon, tue, wed, thu, fri, sat, sun", name)
			}
			t.Weekdays = append(t.Weekdays, uint32(i))
		}
	case cmd.Flags().Changed("monthly"):
		if c.monthly == "last" {
			return nil
		}
		day, err := strconv.ParseUint(c.monthly, 10, 8)
		if err != nil || day < 1 || day > 31 {
			return usage(cmd, "--monthly %q is neither 1 to 31 nor last", c.monthly)
		}
		t.Day = uint32(day)
	case cmd.Flags().Changed("hourly") && !c.hourly, cmd.Flags().Changed("daily") && !c.daily:
		return usage(cmd, "--hourly and --daily have no other value than true")
	}
	return nil
}

// applyRetention changes what was given of the retention.
func (c *chosen) applyRetention(cmd *cobra.Command, spec *vmsnapv1.ScheduleSpec) error {
	r := &vmsnapv1.Retention{}
	if spec.GetRetention() != nil {
		r = proto.CloneOf(spec.GetRetention())
	}
	for name, field := range map[string][2]*uint32{
		"keep-last": {&r.Last, &c.last}, "keep-hourly": {&r.Hourly, &c.hours}, "keep-daily": {&r.Daily, &c.days},
		"keep-weekly": {&r.Weekly, &c.weeks}, "keep-monthly": {&r.Monthly, &c.months}, "keep-yearly": {&r.Yearly, &c.years},
	} {
		if cmd.Flags().Changed(name) {
			*field[0] = *field[1]
		}
	}
	if cmd.Flags().Changed("max-age") {
		age, err := parseAge(c.maxAge)
		if err != nil {
			return usage(cmd, "--max-age: %w", err)
		}
		r.MaxAge = optional(age)
	}
	if cmd.Flags().Changed("max-space") {
		space, err := parseSize(c.maxSpace)
		if err != nil {
			return usage(cmd, "--max-space: %w", err)
		}
		r.MaxSpace = space
	}
	if spec.Retention = r; proto.Equal(r, &vmsnapv1.Retention{}) {
		spec.Retention = nil
	}
	return nil
}

// parseAge reads a duration, or a number of days or weeks.
func parseAge(text string) (time.Duration, error) {
	for unit, hours := range map[string]float64{"d": 24, "w": 7 * 24} {
		if number, ok := strings.CutSuffix(text, unit); ok {
			n, err := strconv.ParseUint(number, 10, 16)
			if err != nil {
				return 0, fmt.Errorf("%q is not an age such as 30d, 4w or 12h", text)
			}
			return time.Duration(float64(n) * hours * float64(time.Hour)), nil
		}
	}
	age, err := time.ParseDuration(cmp.Or(text, "0"))
	if err != nil || age < 0 {
		return 0, fmt.Errorf("%q is not an age such as 30d, 4w or 12h", text)
	}
	return age, nil
}

// parseSize reads a number of bytes, with a unit of 1024s perhaps.
func parseSize(text string) (uint64, error) {
	digits := strings.TrimRight(text, "KMGTPiB")
	n, err := strconv.ParseUint(digits, 10, 64)
	unit := strings.TrimSuffix(strings.TrimSuffix(text[len(digits):], "B"), "i")
	shift := 10 * (strings.Index("KMGTP", unit) + 1)
	if unit == "" {
		shift = 0
	}
	if err != nil || len(unit) > 1 || shift > 0 && n > 1<<(63-shift) {
		return 0, fmt.Errorf("%q is not a size such as 100GiB", text)
	}
	return n << shift, nil
}

// retentionText tells a retention in words.
func retentionText(r *vmsnapv1.Retention) string {
	var parts []string
	for _, rule := range []struct {
		name  string
		count uint32
	}{
		{"last", r.GetLast()}, {"hourly", r.GetHourly()}, {"daily", r.GetDaily()}, {"weekly", r.GetWeekly()},
		{"monthly", r.GetMonthly()}, {"yearly", r.GetYearly()},
	} {
		if rule.count > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", rule.name, rule.count))
		}
	}
	if r.GetMaxAge() != nil {
		parts = append(parts, "none older than "+ageText(r.GetMaxAge()))
	}
	if r.GetMaxSpace() > 0 {
		parts = append(parts, "no more than "+size(r.GetMaxSpace()))
	}
	return cmp.Or(strings.Join(parts, ", "), "everything")
}

func ageText(d *durationpb.Duration) string {
	if age := d.AsDuration(); age%(24*time.Hour) != 0 {
		return age.String()
	}
	return fmt.Sprintf("%dd", d.AsDuration()/(24*time.Hour))
}
