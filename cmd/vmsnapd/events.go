package main

import (
	"bytes"
	"fmt"
	"os"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/systemd"
)

// webhookCredential is the name under which the unit hands over the secret with
// which events are signed.
const webhookCredential = "vmsnap.webhook"

// maxSecret bounds the file with the secret, in bytes.
const maxSecret = 4096

// sinks are where the settings want events passed on to.
func sinks(c config) ([]event.Sink, error) {
	var all []event.Sink
	if c.EventJournal {
		all = append(all, event.NewJournal())
	}
	if c.WebhookURL == "" {
		return all, nil
	}
	secret, err := webhookSecret(c)
	if err != nil {
		return nil, c.wrong("webhook-secret", "%w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	hook, err := event.NewWebhook(c.WebhookURL, secret, host)
	if err != nil {
		return nil, c.wrong("webhook-url", "%w", err)
	}
	return append(all, hook), nil
}

// webhookSecret reads the secret, without the end of its line; nil when there is
// none. One that others may read is none.
func webhookSecret(c config) ([]byte, error) {
	path := c.WebhookSecret
	if path == "" {
		given, err := systemd.Credential(webhookCredential)
		if given == "" || err != nil {
			return nil, err
		}
		path = given
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s has the mode %#o: others may read it", path, info.Mode().Perm())
	}
	if info.Size() > maxSecret {
		return nil, fmt.Errorf("%s has %d bytes; at most %d are taken", path, info.Size(), maxSecret)
	}
	secret, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if secret = bytes.TrimRight(secret, "\r\n"); len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return secret, nil
}
