package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
)

// model is the real QEMU whose answers the scripted VMs give as their own.
type model struct {
	member *member
	qmp    *wire

	mu      sync.Mutex
	answers map[string]answer // by the command as the model gets it
}

// answer is a reply of the model's, with its name and UUID where they occur.
type answer struct {
	member string // of the reply: "return" or "error"
	value  json.RawMessage
}

// modelMember names the model. Neither its name nor its UUID are in anything else
// that a QEMU says.
func modelMember() *member { return newMember("scripted", 0) }

// startModel starts a QEMU as the scripted VMs pretend to be.
func startModel(ctx context.Context, s *scripted) (*model, error) {
	m := &model{member: modelMember(), answers: map[string]answer{}}
	m.member.cmd = exec.Command(s.qemu.Binary, s.arguments(m.member)...)
	if err := s.parent.start(m.member.cmd); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, modelDeadline)
	defer cancel()
	path := s.file(m.member, "qmp")
	err := awaitFile(ctx, path)
	if err == nil {
		m.qmp, err = dialQMP(ctx, path)
	}
	if err != nil {
		m.end()
		return nil, fmt.Errorf("the model of the scripted VMs: %w", err)
	}
	return m, nil
}

func (m *model) end() {
	if m.qmp != nil {
		m.qmp.close()
	}
	endAll([]*member{m.member})
}

// ask returns what the model answers, from memory if it was asked before.
func (m *model) ask(ctx context.Context, line []byte) (answer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := string(line)
	if known, ok := m.answers[key]; ok {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, modelDeadline)
	defer cancel()
	if err := m.qmp.limit(ctx); err != nil {
		return answer{}, err
	}
	a := answer{member: "return"}
	var err error
	var refused refusal
	if a.value, err = m.qmp.exchange(line); errors.As(err, &refused) {
		a, err = answer{"error", json.RawMessage(refused)}, nil
	}
	m.qmp.events = nil // nobody waits for them
	if err != nil {
		return answer{}, fmt.Errorf("the model of the scripted VMs: %w", err)
	}
	a.value = json.RawMessage(withGuest.Replace(string(a.value)))
	m.answers[key] = a
	return a, nil
}

// withGuest makes what QEMU says without a guest what it says with one that runs
// and has a guest agent.
var withGuest = strings.NewReplacer(
	`"frontend-open": false`, `"frontend-open": true`, `"status": "prelaunch"`, `"status": "running"`, `"running": false`, `"running": true`,
)

// speakQMP returns what a VM's QMP server does with a client: it answers as the
// model, under the VM's name and
// UUID.
func (m *model) speakQMP(vm *member) conversation {
	toModel := strings.NewReplacer(vm.name, m.member.name, vm.uuid, m.member.uuid)
	toVM := strings.NewReplacer(m.member.name, vm.name, m.member.uuid, vm.uuid)
	return func(ctx context.Context, c *clientOf) error {
		if err := c.write(m.qmp.greeting); err != nil {
			return err
		}
		for {
			line, err := c.line()
			if err != nil {
				return err
			}
			id, asked, err := withoutID([]byte(toModel.Replace(string(line))))
			if err != nil {
				return err
			}
			a := answer{"return", json.RawMessage("{}")}
			if !bytes.Contains(asked, []byte(`"qmp_capabilities"`)) { // negotiated with the model already
				if a, err = m.ask(ctx, asked); err != nil {
					return err
				}
			}
			reply := fmt.Appendf(nil, `{"%s": %s, "id": %s}`+"\r\n", a.member, toVM.Replace(string(a.value)), id)
			if err := c.write(reply); err != nil {
				return err
			}
		}
	}
}

// withoutID takes the id off a command, so that one command is always the same
// line.
func withoutID(line []byte) (id json.RawMessage, rest []byte, err error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(line, &members); err != nil {
		return nil, nil, fmt.Errorf("a command to a scripted VM: %w", err)
	}
	id = members["id"]
	delete(members, "id")
	if rest, err = json.Marshal(members); err != nil {
		return nil, nil, err
	}
	return id, append(rest, '\n'), nil
}
