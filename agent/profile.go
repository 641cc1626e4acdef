package agent

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// Profile is a set of options for snapshots that has a name. What a request says
// itself goes before it; what is false or empty leaves the choice to the request.
type Profile struct {
	Disks, Exclude []string // patterns of devices, as in path.Match
	Description    string
	Labels         map[string]string
	Quiesce        Quiesce
	Mountpoints    []string
	FreezeTimeout  time.Duration
	Lease          time.Duration
	Strict         bool
	AllowPartial   bool
	Memory         bool
	Strategy       MemoryStrategy
	MaxPause       time.Duration
	Compress       bool
	Hooks          *string            // directory of the hooks, empty for none; nil: the usual one
	Retention      schedule.Retention // of schedules that have none of their own
}

// Check refuses what cannot be meant.
func (p Profile) Check() error {
	for _, pattern := range slices.Concat(p.Disks, p.Exclude) {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("%q is not a pattern", pattern)
		}
	}
	if err := p.Retention.Check(); err != nil {
		return err
	}
	req := SnapshotRequest{}
	p.apply(&req)
	return checkRequest(&req)
}

// apply fills in what a request leaves open.
func (p Profile) apply(req *SnapshotRequest) {
	if len(req.Disks) == 0 && len(req.Exclude) == 0 {
		req.DiskPatterns, req.ExcludePatterns = p.Disks, p.Exclude
	}
	fill(&req.Description, p.Description)
	fill(&req.Quiesce, p.Quiesce)
	fill(&req.FreezeTimeout, p.FreezeTimeout)
	fill(&req.Lease, p.Lease)
	fill(&req.Strict, p.Strict)
	fill(&req.AllowPartial, p.AllowPartial)
	fill(&req.Memory, p.Memory)
	if req.Memory {
		fill(&req.Strategy, p.Strategy)
		fill(&req.MaxPause, p.MaxPause)
		fill(&req.Compress, p.Compress)
	}
	if len(req.Mountpoints) == 0 && req.Quiesce != QuiesceNone {
		req.Mountpoints = p.Mountpoints
	}
	labels := maps.Clone(p.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, req.Labels)
	if len(labels) > 0 {
		req.Labels = labels
	}
	req.Hooks = p.Hooks
}

// fill sets what is not set.
func fill[T comparable](to *T, value T) {
	var zero T
	if *to == zero {
		*to = value
	}
}

// SetProfiles replaces the profiles. They hold for snapshots that begin from now
// on, those of schedules included.
func (a *Agent) SetProfiles(profiles map[string]Profile) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.profiles = maps.Clone(profiles)
}

// profile returns the profile of a name.
func (a *Agent) profile(name string) (Profile, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if p, ok := a.profiles[name]; ok {
		return p, nil
	}
	err := fault.New(fault.NotFound, "there is no profile %q", name)
	if len(a.profiles) == 0 {
		return Profile{}, err.WithHint("no profile is configured; the setting profiles of vmsnapd has them")
	}
	return Profile{}, err.WithHint("known are %s", strings.Join(slices.Sorted(maps.Keys(a.profiles)), ", "))
}

// checkRequest fills in what the request's profile says, and refuses what is wrong with
// the whole.
func (a *Agent) checkRequest(req *SnapshotRequest) error {
	if req.Profile != "" {
		p, err := a.profile(req.Profile)
		if err != nil {
			return err
		}
		p.apply(req)
	}
	return checkRequest(req)
}

// takesDisk says of a disk whether the request takes it, and whether it excludes
// it by name or pattern.
func (r SnapshotRequest) takesDisk(device string) (takes, excluded bool) {
	matches := func(pattern string) bool {
		ok, err := path.Match(pattern, device)
		return ok && err == nil
	}
	if slices.Contains(r.Exclude, device) || slices.ContainsFunc(r.ExcludePatterns, matches) {
		return false, true
	}
	all := len(r.Disks) == 0 && len(r.DiskPatterns) == 0
	return all || slices.Contains(r.Disks, device) || slices.ContainsFunc(r.DiskPatterns, matches), false
}

// retention is what holds for a schedule: its own, or else that of the profile of
// its snapshots.
func (a *Agent) retention(s catalog.ScheduleSpec) schedule.Retention {
	if !s.Retention.None() {
		return s.Retention
	}
	var req SnapshotRequest
	if err := json.Unmarshal(s.Snapshot, &req); err != nil || req.Profile == "" {
		return s.Retention
	}
	p, err := a.profile(req.Profile)
	if err != nil {
		return s.Retention // nothing goes by a profile that is no longer there
	}
	return p.Retention
}
