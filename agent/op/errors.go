package op

import (
	"fmt"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// BusyError says which operation holds a VM. It comes as the cause of a
// *fault.Error of the kind fault.Busy.
type BusyError struct {
	VM        string // its name
	Operation string // id of the operation that runs on it
}

// Error names the VM and the operation.
func (e *BusyError) Error() string {
	return fmt.Sprintf("VM %q is busy with operation %s", e.VM, e.Operation)
}

// busy returns the error for a VM that an operation holds.
func busy(vm, operation string) error {
	return fault.New(fault.Busy, "%w", &BusyError{VM: vm, Operation: operation}).
		WithHint("wait for it, or cancel it: vmsnap operation cancel %s", operation)
}
