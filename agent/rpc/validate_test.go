package rpc

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/vmsnap/vmsnap/agent/fault"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func TestCheckCreate(t *testing.T) {
	long := func(n int) string { return strings.Repeat("ä", n) }
	for name, c := range map[string]struct {
		change func(*vmsnapv1.CreateSnapshotRequest)
		want   string // empty when it is allowed
	}{
		"plain":                {func(*vmsnapv1.CreateSnapshotRequest) {}, ""},
		"longest name":         {func(r *vmsnapv1.CreateSnapshotRequest) { r.Name = long(maxName) }, ""},
		"name too long":        {func(r *vmsnapv1.CreateSnapshotRequest) { r.Name = long(maxName + 1) }, "name has 256 characters"},
		"no VM":                {func(r *vmsnapv1.CreateSnapshotRequest) { r.Vm = "" }, "vm is not given"},
		"VM too long":          {func(r *vmsnapv1.CreateSnapshotRequest) { r.Vm = long(maxRef + 1) }, "vm has 1025 characters"},
		"description too long": {func(r *vmsnapv1.CreateSnapshotRequest) { r.Description = long(5000) }, "description has 5000"},
		"request id too long":  {func(r *vmsnapv1.CreateSnapshotRequest) { r.RequestId = long(129) }, "request_id has 129"},
		"too many disks": {func(r *vmsnapv1.CreateSnapshotRequest) {
			for i := range maxDisks + 1 {
				r.Disks = append(r.Disks, fmt.Sprint(i))
			}
		}, "disks has 257 entries"},
		"empty disk":         {func(r *vmsnapv1.CreateSnapshotRequest) { r.Exclude = []string{""} }, "exclude has an empty entry"},
		"chosen and not":     {func(r *vmsnapv1.CreateSnapshotRequest) { r.Disks, r.Exclude = []string{"a", "b"}, []string{"b"} }, `disk "b" is both`},
		"mount point length": {func(r *vmsnapv1.CreateSnapshotRequest) { r.Mountpoints = []string{long(4097)} }, "an entry of mountpoints has 4097"},
		"empty label key":    {func(r *vmsnapv1.CreateSnapshotRequest) { r.Labels = map[string]string{"": "x"} }, "labels has an empty key"},
		"label key length":   {func(r *vmsnapv1.CreateSnapshotRequest) { r.Labels = map[string]string{long(129): "x"} }, "a label's key has 129"},
		"label value length": {func(r *vmsnapv1.CreateSnapshotRequest) { r.Labels = map[string]string{"x": long(1025)} }, "a label's value has 1025"},
		"too many labels": {func(r *vmsnapv1.CreateSnapshotRequest) {
			r.Labels = map[string]string{}
			for i := range maxLabels + 1 {
				r.Labels[fmt.Sprint(i)] = ""
			}
		}, "labels has 65 entries"},
		"unknown quiesce": {func(r *vmsnapv1.CreateSnapshotRequest) { r.Quiesce = 99 }, "quiesce has the unknown value 99"},
		"a day of lease":  {func(r *vmsnapv1.CreateSnapshotRequest) { r.Lease = durationpb.New(maxDuration) }, ""},
		"longer lease":    {func(r *vmsnapv1.CreateSnapshotRequest) { r.Lease = durationpb.New(maxDuration + 1) }, "lease is 24h0m0.000000001s"},
		"negative time":   {func(r *vmsnapv1.CreateSnapshotRequest) { r.FreezeTimeout = durationpb.New(-time.Second) }, "freeze_timeout is not a duration"},
		"overflowing": {func(r *vmsnapv1.CreateSnapshotRequest) {
			r.Lease = &durationpb.Duration{Seconds: 1 << 62, Nanos: -1}
		}, "lease is not a duration"},
	} {
		t.Run(name, func(t *testing.T) {
			req := &vmsnapv1.CreateSnapshotRequest{Vm: "web"}
			c.change(req)
			expect(t, checkCreate(req), c.want)
		})
	}
}

func TestCheckOthers(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"freeze without VM": {checkFreeze(&vmsnapv1.FreezeVMRequest{}), "vm is not given"},
		"freeze":            {checkFreeze(&vmsnapv1.FreezeVMRequest{Vm: "web"}), ""},
		"rename to nothing": {checkRename(&vmsnapv1.RenameSnapshotRequest{Snapshot: "web/a"}), "new_name is not given"},
		"rename of nothing": {checkRename(&vmsnapv1.RenameSnapshotRequest{NewName: "b"}), "snapshot is not given"},
		"list of all":       {checkListSnapshots(&vmsnapv1.ListSnapshotsRequest{}), ""},
		"too many":          {checkListOperations(&vmsnapv1.ListOperationsRequest{Limit: 10001}), "limit is 10001"},
	} {
		t.Run(name, func(t *testing.T) { expect(t, c.err, c.want) })
	}
}

func expect(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("got %v; want %q", err, want)
	case want != "" && fault.Of(err) != fault.Usage:
		t.Errorf("its kind is %s", fault.Of(err))
	}
}

func TestCheckDelete(t *testing.T) {
	for name, c := range map[string]struct {
		req  *vmsnapv1.DeleteSnapshotsRequest
		want string // empty when it is allowed
	}{
		"named":       {&vmsnapv1.DeleteSnapshotsRequest{Snapshots: []string{"web/one"}}, ""},
		"chosen":      {&vmsnapv1.DeleteSnapshotsRequest{Vm: "web", OlderThan: durationpb.New(time.Hour)}, ""},
		"negative":    {&vmsnapv1.DeleteSnapshotsRequest{Vm: "web", OlderThan: durationpb.New(-1)}, "older_than"},
		"no duration": {&vmsnapv1.DeleteSnapshotsRequest{Vm: "web", OlderThan: &durationpb.Duration{Nanos: -1, Seconds: 1}}, "older_than"},
		"empty name":  {&vmsnapv1.DeleteSnapshotsRequest{Snapshots: []string{""}}, "snapshots has an empty entry"},
		"long name":   {&vmsnapv1.DeleteSnapshotsRequest{Snapshots: []string{strings.Repeat("x", maxRef+1)}}, "an entry of snapshots has 1025"},
		"long VM":     {&vmsnapv1.DeleteSnapshotsRequest{Vm: strings.Repeat("x", maxRef+1)}, "vm has 1025"},
		"long label":  {&vmsnapv1.DeleteSnapshotsRequest{Vm: "web", Labels: map[string]string{"x": strings.Repeat("x", 1025)}}, "a label's value has 1025"},
		"long id":     {&vmsnapv1.DeleteSnapshotsRequest{Vm: "web", RequestId: strings.Repeat("x", 129)}, "request_id has 129"},
	} {
		_, err := deleteRequest(context.WithValue(t.Context(), peerKey{}, Peer{UID: 7}), c.req)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (fault.Of(err) != fault.Usage || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v", name, err)
		}
	}
}
