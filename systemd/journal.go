package systemd

import (
	"fmt"
	"io"
	"strings"
	"sync/atomic"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/hashicorp/go-hclog"
)

// InJournal reports whether standard error leads to the journal, which is when
// records are better sent there with their fields (JOURNAL_STREAM in
// systemd.exec(5)).
func InJournal() bool {
	is, err := journal.StderrIsJournalStream()
	return is && err == nil && journal.Enabled()
}

// Log is a logger whose level can be changed for all loggers made from it.
type Log struct {
	hclog.Logger
	sink *sink // nil unless it writes to the journal
}

// NewLog returns a logger that writes as the options say.
func NewLog(options hclog.LoggerOptions) Log { return Log{Logger: hclog.New(&options)} }

// NewJournalLog returns a logger that sends each record to the journal, with
// its values as fields: vm becomes VMSNAP_VM, operation VMSNAP_OPERATION, disk
// VMSNAP_DISK, and so on; the logger's name is VMSNAP_LOGGER. The message holds
// them too, for the reader of a plain listing.
func NewJournalLog(name string, level hclog.Level) Log {
	return newJournalLog(name, level, journal.Send)
}

func newJournalLog(name string, level hclog.Level, send sendFunc) Log {
	s := &sink{send: send}
	s.level.Store(int32(level))
	log := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: name, Level: level, Output: io.Discard})
	log.RegisterSink(s)
	return Log{log, s}
}

// SetLevel changes the level of this logger and of those made from it.
func (l Log) SetLevel(level hclog.Level) {
	l.Logger.SetLevel(level)
	if l.sink != nil {
		l.sink.level.Store(int32(level))
	}
}

type sendFunc func(message string, priority journal.Priority, fields map[string]string) error

// sink takes the records of an hclog.InterceptLogger, which come here whatever
// the logger's level is.
type sink struct {
	send  sendFunc
	level atomic.Int32
}

// Accept implements hclog.SinkAdapter. A journal that takes nothing has nobody
// who could be told.
func (s *sink) Accept(name string, level hclog.Level, msg string, args ...any) {
	if level < hclog.Level(s.level.Load()) {
		return
	}
	fields := map[string]string{"VMSNAP_LOGGER": name}
	text := strings.Builder{}
	text.WriteString(msg)
	separator := ": "
	for i := 0; i+1 < len(args); i += 2 {
		key, value := fmt.Sprint(args[i]), valueText(args[i+1])
		fields["VMSNAP_"+fieldName(key)] = value
		fmt.Fprintf(&text, "%s%s=%s", separator, key, quoted(value))
		separator = " "
	}
	_ = s.send(text.String(), priority(level), fields)
}

func valueText(value any) string {
	if f, ok := value.(hclog.Format); ok && len(f) > 0 {
		if format, ok := f[0].(string); ok {
			return fmt.Sprintf(format, f[1:]...)
		}
	}
	return fmt.Sprint(value)
}

// quoted makes a value that would not read as one word recognizable.
func quoted(value string) string {
	plain := value != "" && strings.IndexFunc(value, func(r rune) bool {
		return r <= ' ' || r == '"' || r == '=' || r == 0x7f
	}) < 0
	if plain {
		return value
	}
	return fmt.Sprintf("%q", value)
}

// maxField is what the journal takes of a field's name, in bytes.
const maxField = 64 - len("VMSNAP_")

// fieldName turns a key into what the journal takes for a name: capital
// letters, digits and underscores.
func fieldName(key string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		default:
			return '_'
		}
	}, key)
	return name[:min(len(name), maxField)]
}

func priority(level hclog.Level) journal.Priority {
	switch level {
	case hclog.Error:
		return journal.PriErr
	case hclog.Warn:
		return journal.PriWarning
	case hclog.Info:
		return journal.PriInfo
	default:
		return journal.PriDebug
	}
}
