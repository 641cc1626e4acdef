package memdump

import (
	"context"
	"errors"
	"fmt"
	"os"

	"filippo.io/age"
	"golang.org/x/sys/unix"
)

const encryptionAge = "age"

// ErrNotOverwritten says that a plain memory file that was to be encrypted has been removed, but
// what it held may be on the disk still.
var ErrNotOverwritten = errors.New("the plain memory was removed, but could not be overwritten before")

// encryptName is the name of the encrypted file while it is being written.
func encryptName(name string) string { return name + ".encrypting" }

// plainName is the name that the plain file has from when the encrypted one is
// complete.
func plainName(name string) string { return name + ".plain" }

// Encrypt replaces a complete memory file by one that is encrypted to the
// recipient in its header, and compressed before if compress says so. The plain
// one is checked against its checksum on the way, and at the end overwritten and
// removed. It takes one CPU and a few MiB, and space for both files. progress,
// unless nil, is called by the calling goroutine with bytes of the plain file.
//
// Until the encrypted file is complete and durable the plain one is what it was.
// Then it takes another name, the encrypted one takes its place, and it is
// destroyed. After a crash [Remove] destroys all that is left; where the
// encrypted file has its name already, Encrypt goes on too.
//
// The errors are those of [Verify] and [*SpaceError]. After [ErrNotOverwritten] the
// file is encrypted, and the Sum is its own.
func Encrypt(ctx context.Context, dir *os.Root, name string, compress bool, progress func(done, total uint64)) (Sum, error) {
	plain, r, err := openComplete(dir, name)
	if err != nil {
		return Sum{}, err
	}
	defer plain.Close() //nolint:errcheck // it was only read
	if r.Sum.Encryption != "" {
		return *r.Sum, destroy(dir, plainName(name)) // a crash left it
	}
	if r.Recipient == "" {
		return Sum{}, fmt.Errorf("memory file %s: it was made to stay plain", name)
	}
	if r.Sum.Compression != "" {
		return Sum{}, fmt.Errorf("memory file %s: it is compressed already", name)
	}
	recipient, err := age.ParseX25519Recipient(r.Recipient)
	if err != nil {
		return Sum{}, fmt.Errorf("memory file %s: recipient %s: %w", name, r.Recipient, err)
	}
	temp := encryptName(name)
	if err := rewrite(ctx, dir, name, temp, plain, &r, form{compress: compress, recipient: recipient}, progress); err != nil {
		return Sum{}, fmt.Errorf("encrypt memory file %s: %w", name, err)
	}
	if err := replace(dir, name, temp); err != nil {
		return Sum{}, fmt.Errorf("encrypt memory file %s: %w", name, err)
	}
	return *r.Sum, destroy(dir, plainName(name))
}

// replace puts the encrypted file in the place of the plain one, which gets a name
// that says what it is: whatever happens in between, it is found.
func replace(dir *os.Root, name, temp string) error {
	plain := plainName(name)
	if err := dir.Rename(name, plain); err != nil {
		return errors.Join(err, dir.Remove(temp))
	}
	if err := dir.Rename(temp, name); err != nil {
		return errors.Join(err, dir.Rename(plain, name), dir.Remove(temp))
	}
	return syncDir(dir)
}

// destroy overwrites a plain file and removes it, durably. It does not mind if
// there is none.
func destroy(dir *os.Root, name string) error {
	file, err := openRegular(dir, name, os.O_RDWR)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	overwritten := overwrite(file)
	// It goes in any case: a file system that copies on write may have no space.
	if err := errors.Join(file.Close(), dir.Remove(name), syncDir(dir)); err != nil {
		return fmt.Errorf("remove memory file %s: %w", name, err)
	}
	if overwritten != nil {
		return fmt.Errorf("memory file %s: %w: %w", name, ErrNotOverwritten, overwritten)
	}
	return nil
}

// overwrite writes zeros over all that a file holds, durably, and the header last:
// as long as it is there, whoever comes after a crash knows that the rest has to
// go.
func overwrite(file *os.File) error {
	size, err := sizeOf(file)
	if err != nil {
		return err
	}
	zeros := make([]byte, piece)
	back := writeback{file: file}
	write := func(from, to int64) error {
		for at := from; at < to; at += piece {
			if _, err := file.WriteAt(zeros[:min(piece, to-at)], at); err != nil {
				return err
			}
			if err := back.start(at); err != nil {
				return err
			}
			if err := back.settle(context.Background(), back.started-inFlight); err != nil {
				return err
			}
		}
		return unix.Fdatasync(int(file.Fd()))
	}
	if err := write(min(HeaderSize, size), size); err != nil {
		return err
	}
	return write(0, min(HeaderSize, size))
}

// isSecret reports whether a file holds, in plain, what was to be encrypted.
func isSecret(dir *os.Root, name string) bool {
	file, err := openRegular(dir, name, os.O_RDONLY)
	if err != nil {
		return false
	}
	defer file.Close() //nolint:errcheck // it was only read
	r, err := readRecord(file)
	return err == nil && r.Recipient != "" && (r.Sum == nil || r.Sum.Encryption == "")
}
