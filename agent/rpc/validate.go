package rpc

import (
	"slices"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// The limits on the structure of requests. What a name may look like is the
// agent's to say; these only keep requests at a size that honest callers need.
const (
	maxRef         = 1024 // characters of what names a VM, snapshot, disk or operation
	maxName        = 255
	maxDescription = 4096
	maxRequestID   = 128
	maxLabels      = 64
	maxLabelKey    = 128
	maxLabelValue  = 1024
	maxDisks       = 256
	maxMountpoints = 256
	maxMountpoint  = 4096
	maxDuration    = 24 * time.Hour
	maxList        = 10000 // operations in one answer
)

func usage(format string, args ...any) error { return fault.New(fault.Usage, format, args...) }

// first returns the first error.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// The directories of a RebuildCatalog.
const (
	maxDirs = 1000
	maxDir  = 4096 // PATH_MAX
)

// checkRef checks a field that must name something.
func checkRef(field, value string) error {
	if value == "" {
		return usage("%s is not given", field)
	}
	return checkLength(field, value, maxRef)
}

func checkLength(field, value string, limit int) error {
	if n := utf8.RuneCountInString(value); n > limit {
		return usage("%s has %d characters; at most %d are allowed", field, n, limit)
	}
	return nil
}

func checkList(field string, values []string, limit, length int) error {
	if len(values) > limit {
		return usage("%s has %d entries; at most %d are allowed", field, len(values), limit)
	}
	for _, v := range values {
		if v == "" {
			return usage("%s has an empty entry", field)
		}
		if err := checkLength("an entry of "+field, v, length); err != nil {
			return err
		}
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return usage("labels has %d entries; at most %d are allowed", len(labels), maxLabels)
	}
	for key, value := range labels {
		if key == "" {
			return usage("labels has an empty key")
		}
		if err := first(checkLength("a label's key", key, maxLabelKey),
			checkLength("a label's value", value, maxLabelValue)); err != nil {
			return err
		}
	}
	return nil
}

// checkAge checks a duration that may be years.
func checkAge(field string, d *durationpb.Duration) error {
	if d != nil && (d.CheckValid() != nil || d.AsDuration() <= 0) {
		return usage("%s is not a duration of more than zero", field)
	}
	return nil
}

// checkDuration checks an optional duration; absent and zero mean the default.
func checkDuration(field string, d *durationpb.Duration) error {
	switch {
	case d == nil:
		return nil
	case d.CheckValid() != nil || d.AsDuration() < 0:
		return usage("%s is not a duration of zero or more", field)
	case d.AsDuration() > maxDuration:
		return usage("%s is %s; at most %s is allowed", field, d.AsDuration(), maxDuration)
	default:
		return nil
	}
}

func checkFreeze(msg *vmsnapv1.FreezeVMRequest) error {
	return first(
		checkRef("vm", msg.GetVm()),
		checkDuration("lease", msg.GetLease()),
		checkDuration("freeze_timeout", msg.GetFreezeTimeout()),
		checkList("mountpoints", msg.GetMountpoints(), maxMountpoints, maxMountpoint),
	)
}

func checkCreate(msg *vmsnapv1.CreateSnapshotRequest) error {
	if _, ok := quiesces[msg.GetQuiesce()]; !ok {
		return usage("quiesce has the unknown value %d", msg.GetQuiesce())
	}
	if _, ok := strategyValues[msg.GetMemoryStrategy()]; !ok {
		return usage("memory_strategy has the unknown value %d", msg.GetMemoryStrategy())
	}
	for _, d := range msg.GetDisks() {
		if slices.Contains(msg.GetExclude(), d) {
			return usage("disk %q is both chosen and excluded", d)
		}
	}
	return first(
		checkRef("vm", msg.GetVm()),
		checkLength("name", msg.GetName(), maxName),
		checkLength("description", msg.GetDescription(), maxDescription),
		checkLabels(msg.GetLabels()),
		checkList("disks", msg.GetDisks(), maxDisks, maxRef),
		checkList("exclude", msg.GetExclude(), maxDisks, maxRef),
		checkList("mountpoints", msg.GetMountpoints(), maxMountpoints, maxMountpoint),
		checkDuration("freeze_timeout", msg.GetFreezeTimeout()),
		checkDuration("lease", msg.GetLease()),
		checkDuration("max_pause", msg.GetMaxPause()),
		checkAge("expire_after", msg.GetExpireAfter()),
		checkLength("profile", msg.GetProfile(), maxName),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
}

func checkListSnapshots(msg *vmsnapv1.ListSnapshotsRequest) error {
	return first(checkLength("vm", msg.GetVm(), maxRef), checkLabels(msg.GetLabels()))
}

func checkRename(msg *vmsnapv1.RenameSnapshotRequest) error {
	if msg.GetNewName() == "" {
		return usage("new_name is not given")
	}
	return first(checkRef("snapshot", msg.GetSnapshot()), checkLength("new_name", msg.GetNewName(), maxName))
}

func checkListOperations(msg *vmsnapv1.ListOperationsRequest) error {
	if msg.GetLimit() > maxList {
		return usage("limit is %d; at most %d is allowed", msg.GetLimit(), maxList)
	}
	return checkLength("vm", msg.GetVm(), maxRef)
}

var quiesces = map[vmsnapv1.Quiesce]agent.Quiesce{
	vmsnapv1.Quiesce_QUIESCE_UNSPECIFIED: "",
	vmsnapv1.Quiesce_QUIESCE_REQUIRE:     agent.QuiesceRequire,
	vmsnapv1.Quiesce_QUIESCE_PREFER:      agent.QuiescePrefer,
	vmsnapv1.Quiesce_QUIESCE_NONE:        agent.QuiesceNone,
}

// quiesceOf returns the agent's word for a checked value.
func quiesceOf(q vmsnapv1.Quiesce) agent.Quiesce { return quiesces[q] }

var strategyValues = map[vmsnapv1.MemoryStrategy]agent.MemoryStrategy{
	vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_UNSPECIFIED: "",
	vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_BACKGROUND:  agent.MemoryBackground,
	vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_PRECOPY:     agent.MemoryPrecopy,
	vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_STOPPED:     agent.MemoryStopped,
}

// strategyOf returns the word for a checked value.
func strategyOf(s vmsnapv1.MemoryStrategy) agent.MemoryStrategy { return strategyValues[s] }
