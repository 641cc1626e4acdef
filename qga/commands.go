package qga

import (
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// Ping asks for a sign of life (guest-ping).
func (c *Client) Ping(ctx context.Context) error {
	return c.command(ctx, cmdPing, nil, func(json.RawMessage) error { return nil })
}

// Info is what the guest agent says about itself.
type Info struct {
	Version  string
	Commands map[string]bool // whether it serves the command now
}

// CanFreeze tells whether the guest agent serves what a freeze needs.
func (i Info) CanFreeze() bool {
	return i.Commands[cmdStatus] && i.Commands[cmdFreeze] && i.Commands[cmdThaw]
}

// CanFreezeList tells whether it can freeze chosen mount points.
func (i Info) CanFreezeList() bool { return i.Commands[cmdFreezeList] }

// Info returns the guest agent's version and commands (guest-info).
func (c *Client) Info(ctx context.Context) (Info, error) {
	var info Info
	err := c.command(ctx, cmdInfo, nil, func(raw json.RawMessage) (err error) {
		info, err = c.decodeInfo(raw)
		return err
	})
	return info, err
}

func (c *Client) decodeInfo(raw json.RawMessage) (Info, error) {
	var reply struct {
		Version  string          `json:"version"`
		Commands json.RawMessage `json:"supported_commands"`
	}
	if err := decodeInto(raw, &reply); err != nil {
		return Info{}, err
	}
	list, err := decodeList[struct {
		Name    string `json:"name"`
		Enabled bool   `json:"enabled"`
	}](reply.Commands, c.limits)
	if err != nil {
		return Info{}, err
	}
	info := Info{Version: c.text(reply.Version), Commands: make(map[string]bool, len(list))}
	for _, command := range list {
		info.Commands[c.text(command.Name)] = command.Enabled
	}
	return info, nil
}

// OSInfo is the guest's operating system as it tells it. Fields that it does
// not tell are empty.
type OSInfo struct {
	ID            string `json:"id"` // os-release's ID, or mswindows
	Name          string `json:"name"`
	PrettyName    string `json:"pretty-name"`
	Version       string `json:"version"`
	VersionID     string `json:"version-id"`
	KernelRelease string `json:"kernel-release"`
	KernelVersion string `json:"kernel-version"`
	Machine       string `json:"machine"`
}

// OSInfo returns the guest's operating system (guest-get-osinfo).
func (c *Client) OSInfo(ctx context.Context) (OSInfo, error) {
	var info OSInfo
	err := c.command(ctx, cmdOSInfo, nil, func(raw json.RawMessage) error { return decodeInto(raw, &info) })
	if err != nil {
		return OSInfo{}, err
	}
	for _, field := range []*string{
		&info.ID, &info.Name, &info.PrettyName, &info.Version, &info.VersionID,
		&info.KernelRelease, &info.KernelVersion, &info.Machine,
	} {
		*field = c.text(*field)
	}
	return info, nil
}

// Filesystem is one mounted file system of the guest.
type Filesystem struct {
	Name       string `json:"name"` // the block device in the guest, such as vda1
	Mountpoint string `json:"mountpoint"`
	Type       string `json:"type"`
}

// Filesystems returns the guest's file systems on block devices, one entry for
// each mount (guest-get-fsinfo).
func (c *Client) Filesystems(ctx context.Context) ([]Filesystem, error) {
	var list []Filesystem
	err := c.command(ctx, cmdFSInfo, nil, func(raw json.RawMessage) (err error) {
		list, err = decodeList[Filesystem](raw, c.limits)
		return err
	})
	for i, fs := range list {
		list[i] = Filesystem{Name: c.text(fs.Name), Mountpoint: c.text(fs.Mountpoint), Type: c.text(fs.Type)}
	}
	return list, err
}

// FreezeState is what the guest agent says of the guest.
type FreezeState string

// The states of fsfreeze.
const (
	Frozen FreezeState = "frozen"
	Thawed FreezeState = "thawed"
)

// FreezeStatus asks whether the guest is frozen (guest-fsfreeze-status). The
// answer is the guest agent's own record, kept across its restart.
func (c *Client) FreezeStatus(ctx context.Context) (FreezeState, error) {
	var state FreezeState
	err := c.command(ctx, cmdStatus, nil, func(raw json.RawMessage) (err error) {
		state, err = c.decodeState(raw)
		return err
	})
	return state, err
}

func (c *Client) decodeState(raw json.RawMessage) (state FreezeState, err error) {
	if err := decodeInto(raw, &state); err != nil {
		return "", err
	}
	if state != Frozen && state != Thawed {
		return "", fmt.Errorf("%w: state %q", ErrMalformed, c.text(string(state)))
	}
	return state, nil
}

// Freeze freezes the file systems at mountpoints, or all of them when none are
// given, and returns how many were frozen: 0 is no error of the guest's. It
// takes as long as the context's deadline allows. A failure with OpError.Sent
// may leave the guest frozen, now or later, unless it is a CommandError: then
// the guest agent thaws what it had frozen.
func (c *Client) Freeze(ctx context.Context, mountpoints []string) (int, error) {
	if len(mountpoints) > 0 {
		return c.count(ctx, cmdFreezeList, map[string][]string{"mountpoints": mountpoints})
	}
	return c.count(ctx, cmdFreeze, nil)
}

// Thaw thaws all file systems and returns how many were frozen until then. It
// is no error if none was.
func (c *Client) Thaw(ctx context.Context) (int, error) {
	return c.count(ctx, cmdThaw, nil)
}

// Thawing is what the guest answered to EndFreeze.
type Thawing struct {
	Was       FreezeState // just before the thaw; "" with StatusErr
	StatusErr error
	Count     int // how many were frozen until the thaw; 0 with ThawErr
	ThawErr   error
}

// EndFreeze asks whether the guest is frozen and thaws it, like FreezeStatus
// and Thaw, but sends both at once: a frozen guest should not have to wait for a
// second message. The guest agent serves them in their order.
func (c *Client) EndFreeze(ctx context.Context) Thawing {
	var t Thawing
	if t.StatusErr = c.askAndThaw(ctx, &t); !c.inStep {
		// What the thaw was answered cannot be told apart; it does no harm twice.
		t.Count, t.ThawErr = c.Thaw(ctx)
	}
	return t
}

// askAndThaw returns the error of the question, and leaves the client out of
// step when the answer to the thaw was not read.
func (c *Client) askAndThaw(ctx context.Context, t *Thawing) error {
	asking, cancel := bounded(ctx, cmdStatus)
	defer cancel()
	if err := c.take(asking); err != nil {
		return &OpError{Command: cmdStatus, Err: err}
	}
	defer c.release()
	if err := c.ready(asking); err != nil {
		return &OpError{Command: cmdStatus, Err: err}
	}
	err := c.ask(asking, t)
	if c.inStep {
		thawing, cancel := bounded(ctx, cmdThaw)
		defer cancel()
		defer c.bind(thawing)()
		t.ThawErr = c.answer(thawing, cmdThaw, func(raw json.RawMessage) (err error) {
			t.Count, err = decodeCount(raw)
			return err
		})
	}
	return err
}

// ask sends the question and the thaw, and reads the answer to the question.
func (c *Client) ask(ctx context.Context, t *Thawing) error {
	var request []byte
	for _, name := range []string{cmdStatus, cmdThaw} {
		line, err := encode(name, nil)
		if err != nil {
			return c.failed(name, err)
		}
		request = append(request, line...)
	}
	defer c.bind(ctx)()
	if _, err := c.conn.Write(request); err != nil {
		return c.failed(cmdStatus, transportError(ctx, err))
	}
	return c.answer(ctx, cmdStatus, func(raw json.RawMessage) (err error) {
		t.Was, err = c.decodeState(raw)
		return err
	})
}

func (c *Client) count(ctx context.Context, name string, args any) (int, error) {
	var n int
	err := c.command(ctx, name, args, func(raw json.RawMessage) (err error) {
		n, err = decodeCount(raw)
		return err
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

func (c *Client) text(s string) string { return cleanText(s, c.limits.TextBytes) }

// SetTime sets the guest's clock, and with it its hardware clock
// (guest-set-time). A CommandError may mean that only the hardware clock, or
// that both were not set.
func (c *Client) SetTime(ctx context.Context, now time.Time) error {
	args := map[string]int64{"time": now.UnixNano()}
	return c.command(ctx, cmdSetTime, args, func(json.RawMessage) error { return nil })
}
