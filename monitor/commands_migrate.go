package monitor

import "context"

// A MigrationStatus is a state of a migration (MigrationStatus in
// qapi/migration.json).
type MigrationStatus string

// The states of a migration without postcopy and COLO.
const (
	MigrationNone       MigrationStatus = "none"
	MigrationSetup      MigrationStatus = "setup"
	MigrationActive     MigrationStatus = "active"
	MigrationDevice     MigrationStatus = "device"         // saving devices
	MigrationPreSwitch  MigrationStatus = "pre-switchover" // awaits migrate-continue
	MigrationCancelling MigrationStatus = "cancelling"
	MigrationCancelled  MigrationStatus = "cancelled"
	MigrationCompleted  MigrationStatus = "completed"
	MigrationFailed     MigrationStatus = "failed"
	MigrationWaitUnplug MigrationStatus = "wait-unplug"
)

// MigrationRAM counts the memory of a migration (MigrationStats in
// qapi/migration.json).
type MigrationRAM struct {
	Transferred    int64   `json:"transferred"`      // bytes
	Remaining      int64   `json:"remaining"`        // bytes
	Total          int64   `json:"total"`            // bytes
	Duplicate      int64   `json:"duplicate"`        // pages of one repeated byte
	Normal         int64   `json:"normal"`           // pages sent whole
	NormalBytes    int64   `json:"normal-bytes"`     // bytes
	DirtyPagesRate int64   `json:"dirty-pages-rate"` // pages per second
	DirtySyncCount int64   `json:"dirty-sync-count"` // passes begun
	PageSize       int64   `json:"page-size"`        // bytes
	Mbps           float64 `json:"mbps"`             // megabits per second
	PagesPerSecond int64   `json:"pages-per-second"` // sent
}

// Migration is what query-migrate returns (MigrationInfo in
// qapi/migration.json). Times are in milliseconds.
type Migration struct {
	Status           MigrationStatus `json:"status"` // empty if there has been none
	RAM              MigrationRAM    `json:"ram"`
	TotalTime        int64           `json:"total-time"`
	SetupTime        int64           `json:"setup-time"`
	Downtime         int64           `json:"downtime"`          // of a completed migration
	ExpectedDowntime int64           `json:"expected-downtime"` // of an active one
	ErrorDesc        string          `json:"error-desc"`        // of a failed one
	BlockedReasons   []string        `json:"blocked-reasons"`   // why none can be started
}

// QueryMigrate returns the state of the latest migration.
func (s *Session) QueryMigrate(ctx context.Context) (Migration, error) {
	var r Migration
	err := s.Execute(ctx, "query-migrate", nil, &r)
	return r, err
}
