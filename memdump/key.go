package memdump

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"filippo.io/age"
)

// maxKeyFile bounds the file of a key, in bytes: some hundred identities.
const maxKeyFile = 16 << 10

// Key is what memory files are encrypted to, and what opens them: X25519
// identities of age (age-encryption.org/v1). The first is the one that new files
// are encrypted to; the others open what was encrypted to them before.
type Key struct{ identities []*age.X25519Identity }

// ParseKey reads a key as age-keygen writes it: one identity a line,
// AGE-SECRET-KEY-1…, beside empty lines and comments. Its errors never quote
// what was read.
func ParseKey(r io.Reader) (*Key, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("it has more than %d bytes, and so is no key", maxKeyFile)
	}
	k := &Key{}
	for n, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		id, err := age.ParseX25519Identity(line)
		if err != nil {
			return nil, fmt.Errorf("line %d is no X25519 identity of age (AGE-SECRET-KEY-1…)", n+1)
		}
		k.identities = append(k.identities, id)
	}
	if len(k.identities) == 0 {
		return nil, errors.New("it holds no identity of age (AGE-SECRET-KEY-1…)")
	}
	return k, nil
}

// Recipient returns what new files are encrypted to: age1… It is no secret.
func (k *Key) Recipient() string { return k.identities[0].Recipient().String() }

// Recipients returns all whose files the key opens.
func (k *Key) Recipients() []string {
	var all []string
	for _, id := range k.identities {
		all = append(all, id.Recipient().String())
	}
	return all
}

// A KeyError says that a memory file cannot be read with the key that there is.
// Nothing is known about what it holds.
type KeyError struct {
	Recipient string   // that the file is encrypted to
	Have      []string // recipients whose files the key opens; none without a key
}

func (e *KeyError) Error() string {
	if len(e.Have) == 0 {
		return "the memory is encrypted to " + e.Recipient + ", and there is no key"
	}
	return "the memory is encrypted to " + e.Recipient + ", and the key is that of " + strings.Join(e.Have, " and ")
}

// Opens returns a *KeyError unless the key, which may be nil, is that of a
// recipient.
func (k *Key) Opens(recipient string) error {
	var have []string
	if k != nil {
		have = k.Recipients()
	}
	if slices.Contains(have, recipient) {
		return nil
	}
	return &KeyError{Recipient: recipient, Have: have}
}

// opens is Opens for what a complete file says.
func (k *Key) opens(r record) error {
	if r.Sum.Encryption == "" {
		return nil
	}
	return k.Opens(r.Recipient)
}

// decrypt returns what r holds, each piece of it only after it was authenticated.
// What r says cannot make it take more than some MiB.
func (k *Key) decrypt(r io.Reader) (io.Reader, error) {
	all := make([]age.Identity, len(k.identities))
	for i, id := range k.identities {
		all[i] = id
	}
	return age.Decrypt(bufio.NewReaderSize(r, piece), all...)
}
