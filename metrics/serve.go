package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/exporter-toolkit/web"
)

// The deadlines of scrapes.
const (
	// Scrapers send their request at once.
	headerTimeout = 5 * time.Second
	// Longer than Prometheus waits for a scrape by default.
	writeTimeout = 30 * time.Second
	// Scrapers come back every minute or so.
	idleTimeout = 5 * time.Minute
	// A scrape that is under way is not worth holding up the daemon's end.
	stopTimeout = time.Second
)

// Serve serves /metrics at an address until ctx ends. A configuration file of
// Prometheus' exporter-toolkit, "" for none, adds TLS and basic auth.
func (m *Metrics) Serve(ctx context.Context, address, configFile string, log hclog.Logger) error {
	if err := web.Validate(configFile); err != nil {
		return fmt.Errorf("metrics: %s: %w", configFile, err)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	stopped := make(chan error, 1)
	unhook := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		err := server.Shutdown(grace)
		if errors.Is(err, context.DeadlineExceeded) {
			err = server.Close()
		}
		stopped <- err
	})
	systemd := false
	flags := &web.FlagConfig{WebListenAddresses: &[]string{address}, WebSystemdSocket: &systemd, WebConfigFile: &configFile}
	err = web.Serve(listener, server, flags, slog.New(slogTo{log}))
	if unhook() { // ctx has not ended: the listener failed
		return fmt.Errorf("metrics: %w", errors.Join(err, server.Close(), ignoreClosed(listener.Close())))
	}
	return <-stopped
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// slogTo lets the exporter-toolkit, which knows slog only, log to ours.
type slogTo struct{ log hclog.Logger }

func (s slogTo) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

func (s slogTo) Handle(_ context.Context, r slog.Record) error {
	var args []any
	r.Attrs(func(a slog.Attr) bool {
		args = append(args, a.Key, a.Value.String())
		return true
	})
	level := hclog.Info
	switch {
	case r.Level >= slog.LevelError:
		level = hclog.Error
	case r.Level >= slog.LevelWarn:
		level = hclog.Warn
	}
	s.log.Log(level, r.Message, args...)
	return nil
}

func (s slogTo) WithAttrs(attrs []slog.Attr) slog.Handler {
	log := s.log
	for _, a := range attrs {
		log = log.With(a.Key, a.Value.String())
	}
	return slogTo{log}
}

func (s slogTo) WithGroup(name string) slog.Handler { return slogTo{s.log.Named(name)} }
