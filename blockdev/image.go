package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Header is what a qcow2 header says of its image (docs/interop/qcow2.txt).
type Header struct {
	Version       uint32
	VirtualSize   uint64 // bytes
	ClusterBits   uint32
	Backing       string // as written; empty when there is none
	BackingFormat string // empty when the header does not say
	Dirty         bool
	Corrupt       bool
	extendedL2    bool
	snapshots     uint32
	l1            table
}

// table is where a header says that a table lies.
type table struct {
	offset  uint64
	entries uint32
}

var (
	// ErrNotQcow2 means that the file does not begin with qcow2's magic.
	ErrNotQcow2 = errors.New("not a qcow2 image")
	// ErrRefusedImage means that the header asks for something that an image
	// must not be allowed to ask for.
	ErrRefusedImage = errors.New("image refused")
)

const (
	qcow2Magic          = 0x514649fb
	headerMin           = 72
	headerV3            = 104
	maxBackingName      = 1023 // the limit of the format
	extEnd              = 0
	extBackingFormat    = 0xe2792aca
	extMax              = 64 << 10
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	knownIncompat       = incompatDirty | incompatCorrupt | incompatCompression | incompatExtendedL2
	maxL1Entries        = 32 << 17 // 32 MiB, QCOW_MAX_L1_SIZE
)

// ReadHeader reads a qcow2 header. Images are not trusted: everything is
// bounded, nothing that the header names is opened, and a data file, a json:
// or protocol backing name or an unknown incompatible feature is refused with
// ErrRefusedImage.
func ReadHeader(r io.ReaderAt) (Header, error) {
	var b [headerV3]byte
	n, err := r.ReadAt(b[:], 0)
	if n < headerMin {
		if err == nil || errors.Is(err, io.EOF) {
			return Header{}, ErrNotQcow2
		}
		return Header{}, err
	}
	be := binary.BigEndian
	if be.Uint32(b[0:]) != qcow2Magic {
		return Header{}, ErrNotQcow2
	}
	h := Header{
		Version: be.Uint32(b[4:]), ClusterBits: be.Uint32(b[20:]), VirtualSize: be.Uint64(b[24:]),
		l1: table{be.Uint64(b[40:]), be.Uint32(b[36:])}, snapshots: be.Uint32(b[60:]),
	}
	if h.Version != 2 && h.Version != 3 {
		return Header{}, fmt.Errorf("%w: qcow2 version %d", ErrRefusedImage, h.Version)
	}
	if h.ClusterBits < 9 || h.ClusterBits > 21 {
		return Header{}, fmt.Errorf("%w: cluster size 2^%d", ErrRefusedImage, h.ClusterBits)
	}
	if h.VirtualSize > 1<<62 || h.l1.entries > maxL1Entries {
		return Header{}, fmt.Errorf("%w: virtual size %d", ErrRefusedImage, h.VirtualSize)
	}
	length := uint32(headerMin)
	if h.Version == 3 {
		if n < headerV3 {
			return Header{}, fmt.Errorf("%w: header cut short", ErrRefusedImage)
		}
		if err := h.features(be.Uint64(b[72:])); err != nil {
			return Header{}, err
		}
		length = be.Uint32(b[100:])
	}
	if length < headerMin || length > 4096 {
		return Header{}, fmt.Errorf("%w: header of %d bytes", ErrRefusedImage, length)
	}
	if err := h.extensions(r, int64(length)); err != nil {
		return Header{}, err
	}
	return h, h.backing(r, be.Uint64(b[8:]), be.Uint32(b[16:]))
}

func (h *Header) features(incompatible uint64) error {
	if incompatible&incompatDataFile != 0 {
		return fmt.Errorf("%w: it keeps its data in another file", ErrRefusedImage)
	}
	if unknown := incompatible &^ knownIncompat; unknown != 0 {
		return fmt.Errorf("%w: unknown incompatible features %#x", ErrRefusedImage, unknown)
	}
	h.Dirty = incompatible&incompatDirty != 0
	h.Corrupt = incompatible&incompatCorrupt != 0
	h.extendedL2 = incompatible&incompatExtendedL2 != 0
	return nil
}

// extensions walks the header extensions for the backing format.
func (h *Header) extensions(r io.ReaderAt, at int64) error {
	end := min(int64(1)<<h.ClusterBits, at+extMax)
	for at+8 <= end {
		var eh [8]byte
		if _, err := r.ReadAt(eh[:], at); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		kind, size := binary.BigEndian.Uint32(eh[:]), int64(binary.BigEndian.Uint32(eh[4:]))
		at += 8
		if kind == extEnd {
			return nil
		}
		if size > end-at {
			return fmt.Errorf("%w: a header extension of %d bytes", ErrRefusedImage, size)
		}
		if kind == extBackingFormat {
			if size > 16 {
				return fmt.Errorf("%w: a backing format of %d bytes", ErrRefusedImage, size)
			}
			name := make([]byte, size)
			if _, err := r.ReadAt(name, at); err != nil {
				return fmt.Errorf("%w: header cut short", ErrRefusedImage)
			}
			h.BackingFormat = string(name)
			if h.BackingFormat != "qcow2" && h.BackingFormat != "raw" {
				return fmt.Errorf("%w: backing format %q", ErrRefusedImage, h.BackingFormat)
			}
		}
		at += (size + 7) &^ 7
	}
	return nil
}

func (h *Header) backing(r io.ReaderAt, offset uint64, size uint32) error {
	if offset == 0 {
		return nil
	}
	if size == 0 || size > maxBackingName || offset > uint64(1)<<h.ClusterBits {
		return fmt.Errorf("%w: backing name of %d bytes at %d", ErrRefusedImage, size, offset)
	}
	name := make([]byte, size)
	if _, err := r.ReadAt(name, int64(offset)); err != nil {
		return fmt.Errorf("%w: header cut short", ErrRefusedImage)
	}
	h.Backing = string(name)
	return CheckBackingName(h.Backing)
}

// CheckBackingName refuses backing names that are not plain paths.
func CheckBackingName(name string) error {
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return fmt.Errorf("%w: backing name %q", ErrRefusedImage, name)
	}
	// QEMU takes everything before a colon that comes before a slash for a
	// protocol (path_has_protocol in block.c), "json:" included.
	if colon := strings.IndexByte(name, ':'); colon >= 0 {
		if slash := strings.IndexByte(name, '/'); slash < 0 || colon < slash {
			return fmt.Errorf("%w: backing name %q names a protocol", ErrRefusedImage, name)
		}
	}
	return nil
}

// ReadHeaderFile reads the header of a file, which must be a regular file or a
// block device: a FIFO would hang.
func ReadHeaderFile(path string) (Header, error) {
	f, err := openImage(path)
	if err != nil {
		return Header{}, err
	}
	defer func() { _ = f.Close() }()
	h, err := ReadHeader(f)
	if err != nil {
		return Header{}, fmt.Errorf("%s: %w", path, err)
	}
	return h, nil
}

// BackingPath returns the path of an image's backing file as QEMU resolves it:
// relative to the directory of the image's own name. Empty when there is none.
func (h Header) BackingPath(image string) string {
	if h.Backing == "" || filepath.IsAbs(h.Backing) {
		return h.Backing
	}
	return filepath.Join(filepath.Dir(image), h.Backing)
}

// Empty reports whether the image holds no data of its own, so that it reads
// as its backing file does. An L1 entry that is not zero counts as data.
func (h Header) Empty(r io.ReaderAt) (bool, error) {
	buf := make([]byte, 64<<10)
	left := int64(h.l1.entries) * 8
	for at := int64(h.l1.offset); left > 0; {
		n := min(left, int64(len(buf)))
		if _, err := r.ReadAt(buf[:n], at); err != nil {
			return false, fmt.Errorf("read the L1 table: %w", err)
		}
		for _, c := range buf[:n] {
			if c != 0 {
				return false, nil
			}
		}
		at, left = at+n, left-n
	}
	return true, nil
}

// IsEmpty reports whether a qcow2 file holds no data of its own.
func IsEmpty(path string) (bool, error) {
	f, err := openImage(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	h, err := ReadHeader(f)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return h.Empty(f)
}
