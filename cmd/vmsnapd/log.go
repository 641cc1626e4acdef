package main

import (
	"os"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/systemd"
)

// logger writes to the journal, with fields, where standard error would lead
// there, and else to standard error. JSON lines are for those who asked for
// them, wherever they go.
func logger(c config) systemd.Log {
	if c.LogFormat == "text" && systemd.InJournal() {
		return systemd.NewJournalLog("vmsnapd", hclog.LevelFromString(c.LogLevel))
	}
	return systemd.NewLog(logOptions(c, "vmsnapd"))
}

// logOptions are those of a log on standard error. The journal knows the time.
func logOptions(c config, name string) hclog.LoggerOptions {
	return hclog.LoggerOptions{
		Name: name, Level: hclog.LevelFromString(c.LogLevel), JSONFormat: c.LogFormat == "json", Output: os.Stderr,
		DisableTime: c.LogFormat == "text" && systemd.InJournal(),
	}
}
