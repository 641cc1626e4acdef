package op

import (
	"context"
	"encoding/json"
	"slices"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// memStore is a Store in memory whose calls a test can look at, hold up and let
// fail.
type memStore struct {
	// before, if set, is called before each call with its number, from 1 on. An
	// error fails the call.
	before func(call int, method string, rec Record) error

	mu       sync.Mutex
	calls    []string
	ops      []Record // oldest first
	requests map[requestKey]string
	journal  []Entry
}

type requestKey struct {
	uid uint32
	id  string
}

func (s *memStore) enter(method string, rec Record) error {
	s.mu.Lock()
	s.calls = append(s.calls, method)
	n, before := len(s.calls), s.before
	s.mu.Unlock()
	if before == nil {
		return nil
	}
	return before(n, method, rec)
}

// count returns how many calls of a method there were.
func (s *memStore) count(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.calls {
		if c == method {
			n++
		}
	}
	return n
}

func (s *memStore) CreateOperation(_ context.Context, rec Record) error {
	if err := s.enter("create", rec); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := requestKey{rec.UID, rec.RequestID}
	if _, taken := s.requests[key]; taken || s.index(rec.ID) >= 0 {
		return fault.New(fault.Exists, "taken")
	}
	s.ops = append(s.ops, rec.clone())
	if rec.RequestID != "" {
		if s.requests == nil {
			s.requests = make(map[requestKey]string)
		}
		s.requests[key] = rec.ID
	}
	return nil
}

func (s *memStore) UpdateOperation(_ context.Context, rec Record) error {
	if err := s.enter("update", rec); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.index(rec.ID)
	if i < 0 {
		return fault.New(fault.NotFound, "no operation %s", rec.ID)
	}
	s.ops[i] = rec.clone()
	if rec.State.Final() {
		s.journal = slices.DeleteFunc(s.journal, func(e Entry) bool { return e.Operation == rec.ID })
	}
	return nil
}

func (s *memStore) Operation(_ context.Context, id string) (Record, error) {
	if err := s.enter("operation", Record{ID: id}); err != nil {
		return Record{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.index(id); i >= 0 {
		return s.ops[i].clone(), nil
	}
	return Record{}, fault.New(fault.NotFound, "no operation %s", id)
}

func (s *memStore) Operations(_ context.Context, f Filter) ([]Record, error) {
	if err := s.enter("operations", Record{}); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Record
	for _, rec := range slices.Backward(s.ops) {
		if f.VMID != "" && rec.VMID != f.VMID || f.Active && rec.State.Final() {
			continue
		}
		out = append(out, rec.clone())
	}
	if f.Limit > 0 && len(out) > f.Limit {
		out = out[:f.Limit]
	}
	return out, nil
}

func (s *memStore) OperationByRequest(_ context.Context, uid uint32, requestID string) (Record, bool, error) {
	if err := s.enter("by-request", Record{}); err != nil {
		return Record{}, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.requests[requestKey{uid, requestID}]
	if !ok {
		return Record{}, false, nil
	}
	return s.ops[s.index(id)].clone(), true, nil
}

func (s *memStore) AppendJournal(_ context.Context, operation, kind string, data json.RawMessage) (Entry, error) {
	if err := s.enter("journal", Record{ID: operation}); err != nil {
		return Entry{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := Entry{Seq: int64(len(s.calls)), Operation: operation, Kind: kind, Data: data, Time: now()}
	s.journal = append(s.journal, e)
	return e, nil
}

func (s *memStore) Journal(_ context.Context, operation string) ([]Entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.journal), func(e Entry) bool { return e.Operation != operation }), nil
}

// index finds an operation. The caller holds s.mu.
func (s *memStore) index(id string) int {
	return slices.IndexFunc(s.ops, func(r Record) bool { return r.ID == id })
}

// stored returns the record of an operation as the store has it.
func (s *memStore) stored(t *testing.T, id string) Record {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.index(id)
	if i < 0 {
		t.Fatalf("the store has no operation %s", id)
	}
	return s.ops[i].clone()
}

func newTestRunner(s Store, opts ...Option) *Runner {
	return NewRunner(s, hclog.NewNullLogger(), opts...)
}

// web is a spec of an operation on the VM "web".
var web = Spec{Kind: KindSnapshot, VMID: "vm1", VMName: "web", Request: map[string]any{"Name": "one"}, UID: 7}

func mustStart(t *testing.T, r *Runner, spec Spec, recipe Recipe) Record {
	t.Helper()
	rec, err := r.Start(t.Context(), spec, recipe)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// wait returns the record of an operation that has ended.
func wait(t *testing.T, r *Runner, id string) Record {
	t.Helper()
	rec, err := r.Wait(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if !rec.State.Final() {
		t.Fatalf("waited for an operation that is %s", rec.State)
	}
	return rec
}

func wantKind(t *testing.T, what string, err error, kind fault.Kind) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want %s", what, kind)
	} else if got := fault.Of(err); got != kind {
		t.Errorf("%s: %s (%v), want %s", what, got, err, kind)
	}
}

// wantEnd fails the test unless an operation ended in a state and for a reason.
func wantEnd(t *testing.T, rec Record, state State, kind fault.Kind) {
	t.Helper()
	var got fault.Kind
	if rec.Failure != nil {
		got = rec.Failure.Kind
	}
	if rec.State != state || got != kind {
		t.Errorf("ended %s, %q (%+v), want %s, %q", rec.State, got, rec.Failure, state, kind)
	}
}
