package op

import (
	"context"
	"encoding/json"
	"time"
)

// Store keeps operations and their journals. What its methods have written is
// durable when they return without an error; after an error nothing of it is
// there. Once called they run to their end even when ctx is cancelled.
type Store interface {
	// CreateOperation records a new operation, and its request id, if any, for
	// RequestRetention. It fails with fault.Exists when the id or the request id
	// is taken.
	CreateOperation(ctx context.Context, rec Record) error
	// UpdateOperation replaces the record of an operation. A final state drops
	// the operation's journal with it.
	UpdateOperation(ctx context.Context, rec Record) error
	// Operation returns the record of an operation or fault.NotFound.
	Operation(ctx context.Context, id string) (Record, error)
	// Operations returns the records that the filter lets through, newest first.
	Operations(ctx context.Context, f Filter) ([]Record, error)
	// OperationByRequest returns the operation that a user started under a
	// request id within RequestRetention.
	OperationByRequest(ctx context.Context, uid uint32, requestID string) (Record, bool, error)
	// AppendJournal adds an entry to the journal of an unfinished operation.
	AppendJournal(ctx context.Context, operation, kind string, data json.RawMessage) (Entry, error)
	// Journal returns the entries of an operation, oldest first.
	Journal(ctx context.Context, operation string) ([]Entry, error)
}

// RequestRetention is how long a request id stands for its operation. While that
// has not ended it does in any case.
const RequestRetention = 30 * 24 * time.Hour

// OperationRetention is how long an operation is kept after its end, and
// OperationsKept how many are. One whose request id still stands for it is kept
// in any case, and the last OperationsSpared are however old they seem: the clock
// may have jumped.
const (
	OperationRetention = 90 * 24 * time.Hour
	OperationsKept     = 10000
	OperationsSpared   = 1000
)

// Filter chooses operations.
type Filter struct {
	VMID    string            // of one VM only, unless empty
	Active  bool              // only those that have not ended
	Visible func(Record) bool // only these; all when nil
	Limit   int               // no more than these; all when 0
}
