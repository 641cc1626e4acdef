package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

const (
	hookSource = "/sys/firmware/qemu_fw_cfg/by_name/" + wire.FreezeHookFile + "/raw"
	hookFile   = "/run/fsfreeze-hook"
	agentLog   = "/run/qemu-ga.log"
)

// startAgent starts qemu-ga, anew if it runs. Its frozen state is kept in /run,
// as on any Linux, so an agent that died while frozen comes back frozen.
func (s *server) startAgent() error {
	s.agentMu.Lock()
	defer s.agentMu.Unlock()
	if err := s.killAgentLocked(); err != nil {
		return err
	}
	args := []string{"-m", "virtio-serial", "-p", s.ports[wire.AgentPort], "-t", "/run",
		"-f", "/run/qemu-ga.pid", "-l", agentLog}
	if slices.Contains(s.params.with, wire.WithHook) {
		hook, err := os.ReadFile(hookSource)
		if err != nil {
			return fmt.Errorf("read the freeze hook: %w", err)
		}
		if err := os.WriteFile(hookFile, hook, 0o700); err != nil {
			return err
		}
		args = append(args, "-F"+hookFile)
	}
	cmd := exec.Command("qemu-ga", args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the guest agent: %w", err)
	}
	s.agent = &agent{cmd.Process, make(chan struct{})}
	go func(ended chan struct{}) {
		_ = cmd.Wait() // how it ends is the host's doing
		close(ended)
	}(s.agent.ended)
	return nil
}

// agent is a running qemu-ga.
type agent struct {
	process *os.Process
	ended   chan struct{}
}

// killAgentLocked is called with agentMu held.
func (s *server) killAgentLocked() error {
	if s.agent == nil {
		return nil
	}
	if err := s.agent.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill the guest agent: %w", err)
	}
	<-s.agent.ended // a port can be opened once
	s.agent = nil
	return nil
}
