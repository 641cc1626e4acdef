package main

import (
	"context"
	"maps"
	"os"
	"reflect"
	"slices"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/pflag"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/systemd"
)

// source is where the settings come from, so that they can be read again.
type source struct {
	flags *pflag.FlagSet
	given config // the flags, and the defaults of the others
	file  string
	named bool // the file must exist
}

func (s source) load() (config, error) {
	c := s.given
	err := c.load(s.file, s.named, s.flags)
	return c, err
}

// reloader reads the configuration again.
type reloader struct {
	source source
	config config // in effect
	agent  *agent.Agent
	log    systemd.Log
}

// run reloads with each signal until ctx ends.
func (r *reloader) run(ctx context.Context, hangups <-chan os.Signal) {
	for {
		select {
		case <-hangups:
			r.told(systemd.Reloading())
			r.reload(ctx)
			r.told(systemd.Ready())
		case <-ctx.Done():
			return
		}
	}
}

func (r *reloader) told(err error) {
	if err != nil {
		r.log.Warn("reload", "error", err)
	}
}

// reload changes what can be changed in a daemon that runs, and names the rest.
// A mistake changes nothing.
func (r *reloader) reload(ctx context.Context) {
	fresh, err := r.source.load()
	if err != nil {
		r.log.Error("not reloaded: the settings have a mistake", "error", err)
		return
	}
	if err := r.agent.Reload(ctx); err != nil {
		r.log.Error("not reloaded: the files of VMs", "dir", r.config.VMsDir, "error", err)
		return
	}
	if fresh.LogLevel != r.config.LogLevel {
		r.config.LogLevel = fresh.LogLevel
		r.log.SetLevel(hclog.LevelFromString(fresh.LogLevel))
	}
	r.agent.SetProfiles(fresh.Profiles)
	r.config.Profiles = fresh.Profiles
	for _, name := range changed(r.config, fresh) {
		r.log.Warn("a setting takes effect when vmsnapd is started again", "setting", name)
	}
	r.log.Info("reloaded", "log_level", fresh.LogLevel, "vms_dir", r.config.VMsDir)
}

// changed names the settings that differ.
func changed(a, b config) []string {
	theirs := b.settings()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(a.settings())) {
		if !reflect.DeepEqual(a.settings()[name], theirs[name]) {
			names = append(names, name)
		}
	}
	return names
}
