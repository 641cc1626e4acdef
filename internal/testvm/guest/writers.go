package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// heartbeat is the time between two bytes on the heartbeat port.
const heartbeat = time.Millisecond

// ringName is the writer's file in the root of its file system.
const ringName = ".testvm-ring"

// writers show from outside how the guest fares: a heartbeat shows whether its
// CPUs run, and a writer for each file system whether its writes are served.
type writers struct {
	stop    atomic.Bool
	running sync.WaitGroup
	pulse   *port
	reports *port
	sending sync.Mutex // one line at a time on reports

	mu  sync.Mutex
	err error // of the writers that failed
}

func (s *server) startWriters() error {
	s.writersMu.Lock()
	defer s.writersMu.Unlock()
	if s.writers != nil {
		return errors.New("the writers run already")
	}
	w := &writers{}
	var err error
	if w.pulse, err = openPort(s.ports[wire.HeartbeatPort]); err != nil {
		return err
	}
	if w.reports, err = openPort(s.ports[wire.WritesPort]); err != nil {
		return errors.Join(err, w.pulse.close())
	}
	for _, label := range s.params.mounts {
		w.running.Add(1)
		go w.run(func() error { return w.write(label) })
	}
	w.running.Add(1)
	go w.run(w.beat)
	s.writers = w
	return nil
}

// stopWriters answers when the last write is durable, so it waits while a file
// system is frozen.
func (s *server) stopWriters() error {
	s.writersMu.Lock()
	defer s.writersMu.Unlock()
	w := s.writers
	if w == nil {
		return nil
	}
	w.stop.Store(true)
	w.running.Wait()
	s.writers = nil
	return errors.Join(w.err, w.pulse.close(), w.reports.close())
}

func (w *writers) run(work func() error) {
	defer w.running.Done()
	if err := work(); err != nil {
		fmt.Fprintf(os.Stderr, "testvm guest: %v\n", err)
		w.mu.Lock()
		w.err = errors.Join(w.err, err)
		w.mu.Unlock()
	}
}

func (w *writers) beat() error {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for !w.stop.Load() {
		<-ticker.C
		if _, err := w.pulse.Write([]byte{'.'}); err != nil {
			return fmt.Errorf("heartbeat: %w", err)
		}
	}
	return nil
}

// write goes on with the ring of one file system and reports each record when
// it is durable, as "label number".
func (w *writers) write(label string) (err error) {
	f, err := openRing(label)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := wire.ScanRing(f)
	if err != nil {
		return fmt.Errorf("%s: %w", label, err)
	}
	record := make([]byte, wire.RecordSize)
	for !w.stop.Load() {
		n++
		wire.PutRecord(record, n)
		if _, err := f.WriteAt(record, wire.Offset(n)); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return fmt.Errorf("%s: fdatasync: %w", label, err)
		}
		if err := w.report(label, n); err != nil {
			return err
		}
	}
	return nil
}

func (w *writers) report(label string, n uint64) error {
	w.sending.Lock()
	defer w.sending.Unlock()
	_, err := fmt.Fprintf(w.reports, "%s %d\n", label, n)
	return err
}

// openRing opens the ring of a file system, and makes it if there is none.
func openRing(label string) (*os.File, error) {
	path := filepath.Join(wire.MountRoot, label, ringName)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if err := writeDurably(path, make([]byte, wire.RingSize)); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

// scan returns the last record that a file system holds.
func scan(label string) (uint64, error) {
	f, err := os.Open(filepath.Join(wire.MountRoot, label, ringName))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	return wire.ScanRing(io.ReaderAt(f))
}
