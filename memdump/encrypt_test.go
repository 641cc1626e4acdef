package memdump

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/unix"
)

var theKey, otherKey = newKey(), newKey()

func newKey() *Key {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		panic(err)
	}
	return &Key{[]*age.X25519Identity{id}}
}

func someKey() *Key { return theKey }

// secret makes a complete plain file that is to be encrypted, and holds data.
func secret(tb testing.TB, root *os.Root, data []byte) Sum {
	tb.Helper()
	return secretCalled(tb, root, "m", data)
}

func secretCalled(tb testing.TB, root *os.Root, name string, data []byte) Sum {
	tb.Helper()
	f, err := Create(root, name, secretHeader(), uint64(len(data)))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	if _, err := f.Target().Write(data); err != nil {
		tb.Fatal(err)
	}
	sum, err := f.Finish(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return sum
}

// streamed returns what a QEMU would get.
func streamed(ctx context.Context, t *testing.T, root *os.Root, k *Key) ([]byte, error) {
	t.Helper()
	s, err := OpenStream(ctx, root, "m", k)
	if err != nil {
		return nil, err
	}
	defer s.Close() //nolint:errcheck // Wait says how it went
	got, err := io.ReadAll(s.File)
	return got, errors.Join(err, s.Wait(ctx))
}

func TestEncrypt(t *testing.T) {
	for name, compress := range map[string]bool{"as it is": false, "compressed": true} {
		t.Run(name, func(t *testing.T) {
			root := openRoot(t, t.TempDir())
			data := pattern(9<<20 + 1234)
			plain := secret(t, root, data)
			for _, left := range []string{encryptName("m"), plainName("m")} {
				if err := root.WriteFile(left, []byte("a crash left this"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var last uint64
			sum, err := Encrypt(t.Context(), root, "m", compress, func(done, total uint64) {
				if done < last || total != plain.Stored {
					t.Errorf("progress %d of %d after %d", done, total, last)
				}
				last = done
			})
			if err != nil || last != plain.Stored {
				t.Fatalf("progress ended at %d, %v", last, err)
			}
			if sum.Length != plain.Length || sum.Encryption != "age" || sum.Checksum != "" || compress != (sum.Stored < plain.Stored*6/10) {
				t.Errorf("%+v became %+v", plain, sum)
			}
			if st := stat(t, root, "m"); st.Size != HeaderSize+int64(sum.Stored) || st.Mode&0o7777 != 0o600 {
				t.Errorf("size %d, mode %o", st.Size, st.Mode&0o7777)
			}
			if left := names(t, root); len(left) != 1 {
				t.Errorf("left behind: %v", left)
			}
			stored, err := root.ReadFile("m")
			if err != nil || bytes.Contains(stored, data[:64]) || bytes.Contains(stored, []byte(plain.Checksum)) {
				t.Errorf("the file tells of what it holds, %v", err)
			}
			if h, got, err := Verify(t.Context(), root, "m", someKey(), nil); h != secretHeader() || got != sum || err != nil {
				t.Errorf("verified %+v %+v, %v", h, got, err)
			}
			if got, err := streamed(followContext(t), t, root, someKey()); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes are streamed, the same: %v, %v", len(got), bytes.Equal(got, data), err)
			}
			again, err := Encrypt(t.Context(), root, "m", compress, nil)
			if err != nil || again != sum {
				t.Errorf("a second time: %+v, %v", again, err)
			}
		})
	}
}

// What age's own tool would do with the bytes behind the header.
func TestEncryptedFilesAreAges(t *testing.T) {
	root := openRoot(t, t.TempDir())
	data := pattern(3 << 20)
	secret(t, root, data)
	if _, err := Encrypt(t.Context(), root, "m", false, nil); err != nil {
		t.Fatal(err)
	}
	stored, err := root.ReadFile("m")
	if err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(bytes.NewReader(stored[HeaderSize:]), someKey().identities[0])
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// Another key, or none, is told by name before anything is read.
func TestEncryptedNeedsItsKey(t *testing.T) {
	root := openRoot(t, t.TempDir())
	secret(t, root, pattern(1<<20))
	if _, err := Encrypt(t.Context(), root, "m", false, nil); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		key  *Key
		have []string
	}{"none": {nil, nil}, "another": {otherKey, otherKey.Recipients()}} {
		t.Run(name, func(t *testing.T) {
			_, _, verified := Verify(t.Context(), root, "m", tt.key, nil)
			_, opened := OpenStream(t.Context(), root, "m", tt.key)
			for what, err := range map[string]error{"verify": verified, "open": opened} {
				refused, ok := errors.AsType[*KeyError](err)
				if !ok || refused.Recipient != someKey().Recipient() || !slices.Equal(refused.Have, tt.have) {
					t.Errorf("%s: %v", what, err)
				}
				if err == nil || !strings.Contains(err.Error(), "memory file m: ") || errors.Is(err, ErrAltered) {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
	both := &Key{slices.Concat(otherKey.identities, someKey().identities)}
	if _, _, err := Verify(t.Context(), root, "m", both, nil); err != nil {
		t.Errorf("with an older key beside the present one: %v", err)
	}
}

// A bit anywhere, an end that is missing, or bytes beyond it: nobody takes it for
// what was saved, and no QEMU gets its end.
func TestEncryptedAltered(t *testing.T) {
	for name, compress := range map[string]bool{"as it is": false, "compressed": true} {
		t.Run(name, func(t *testing.T) {
			root := openRoot(t, t.TempDir())
			secret(t, root, pattern(12<<20))
			sum, err := Encrypt(t.Context(), root, "m", compress, nil)
			if err != nil {
				t.Fatal(err)
			}
			refused := func(what string) {
				t.Helper()
				if _, _, err := Verify(t.Context(), root, "m", someKey(), nil); !errors.Is(err, ErrAltered) {
					t.Errorf("%s: verified: %v", what, err)
				}
				got, err := streamed(followContext(t), t, root, someKey())
				if !errors.Is(err, ErrAltered) || uint64(len(got))+holdBack > sum.Length {
					t.Errorf("%s: %d bytes of %d were streamed, %v", what, len(got), sum.Length, err)
				}
			}
			for _, at := range []uint64{0, 30, 200, sum.Stored / 2, sum.Stored - 1} {
				altered(t, root, HeaderSize+int64(at), 1, func() { refused("a bit") })
			}
			// With a header that fits, as somebody would make it who has no key.
			stored, err := root.ReadFile("m")
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{0, 10, 300, len(stored)/2 - HeaderSize, len(stored) - HeaderSize - 1} {
				forge(t, root, sum, stored[HeaderSize:HeaderSize+n])
				refused("cut off")
			}
			forge(t, root, sum, append(stored[HeaderSize:], "more"...))
			refused("longer")
		})
	}
}

// forge writes a file with a header that goes with what is stored.
func forge(t *testing.T, root *os.Root, sum Sum, stored []byte) {
	t.Helper()
	sum.Stored, sum.StoredChecksum = uint64(len(stored)), digestOf(stored)
	block, err := record{Header: secretHeader(), Sum: &sum}.encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := root.WriteFile("m", append(block, stored...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Before the encrypted file is whole, the plain one is what it was.
func TestEncryptFails(t *testing.T) {
	t.Run("cancelled", func(t *testing.T) {
		root := openRoot(t, t.TempDir())
		plain := secret(t, root, pattern(10<<20))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_, err := Encrypt(ctx, root, "m", true, func(done, total uint64) {
			if done > total/2 {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		unharmed(t, root, plain)
	})
	t.Run("without space", func(t *testing.T) {
		root := mounted(t, "tmpfs", "size=6m")
		plain := secret(t, root, pattern(4<<20))
		_, err := Encrypt(t.Context(), root, "m", false, nil)
		if space, ok := errors.AsType[*SpaceError](err); !ok || space.Needed <= HeaderSize+plain.Length {
			t.Errorf("got %v", err)
		}
		unharmed(t, root, plain)
	})
	t.Run("altered", func(t *testing.T) {
		root := openRoot(t, t.TempDir())
		plain := secret(t, root, pattern(4<<20))
		altered(t, root, HeaderSize+3<<20, 1, func() {
			if _, err := Encrypt(t.Context(), root, "m", false, nil); !errors.Is(err, ErrAltered) {
				t.Errorf("got %v", err)
			}
		})
		unharmed(t, root, plain)
	})
	t.Run("to nobody", func(t *testing.T) {
		root := openRoot(t, t.TempDir())
		plain := finished(t, root, "m", pattern(4<<10))
		if _, err := Encrypt(t.Context(), root, "m", false, nil); err == nil {
			t.Error("a file without a recipient was encrypted")
		}
		unharmed(t, root, plain)
	})
	t.Run("only compressed", func(t *testing.T) {
		root := openRoot(t, t.TempDir())
		plain := secret(t, root, pattern(4<<10))
		if _, err := Compress(t.Context(), root, "m", nil); err == nil {
			t.Error("a file that is to be encrypted was compressed in plain")
		}
		unharmed(t, root, plain)
	})
}

// What was to be encrypted is overwritten before it goes, in whatever state a crash
// left it. The second name of each file shows what is on the disk.
func TestPlainMemoryIsDestroyed(t *testing.T) {
	data := pattern(3<<20 + 77)
	for name, tt := range map[string]struct {
		leave  func(t *testing.T, root *os.Root)
		secret []string // whose data must go
	}{
		"while it was saved": {func(t *testing.T, root *os.Root) {
			f, err := Create(root, "m", secretHeader(), 8<<20)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Target().Write(data); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}, []string{"m"}},
		"when it was saved": {func(t *testing.T, root *os.Root) { secret(t, root, data) }, []string{"m"}},
		"between the two renames": {func(t *testing.T, root *os.Root) {
			secret(t, root, data)
			if err := root.Rename("m", plainName("m")); err != nil {
				t.Fatal(err)
			}
			if err := root.WriteFile(encryptName("m"), []byte("…"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{plainName("m")}},
		"while it was overwritten": {func(t *testing.T, root *os.Root) {
			secret(t, root, data)
			if _, err := Encrypt(t.Context(), root, "m", false, nil); err != nil {
				t.Fatal(err)
			}
			if err := root.WriteFile(plainName("m"), append(make([]byte, HeaderSize), data...), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{plainName("m")}},
	} {
		t.Run(name, func(t *testing.T) {
			root, aside := openRoot(t, t.TempDir()), t.TempDir()
			tt.leave(t, root)
			for _, n := range tt.secret {
				if err := os.Link(filepath.Join(root.Name(), n), filepath.Join(aside, n)); err != nil {
					t.Fatal(err)
				}
			}
			if err := Remove(root, "m"); err != nil {
				t.Fatal(err)
			}
			if left := names(t, root); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
			for _, n := range tt.secret {
				onDisk, err := os.ReadFile(filepath.Join(aside, n))
				if err != nil || len(onDisk) < len(data) || len(bytes.Trim(onDisk, "\x00")) > 0 {
					t.Errorf("%s: %d bytes are on the disk, %d not overwritten, %v", n, len(onDisk), len(bytes.Trim(onDisk, "\x00")), err)
				}
			}
		})
	}
}

// Encrypt itself destroys the plain file, whose second name shows it.
func TestEncryptDestroysThePlainFile(t *testing.T) {
	root := openRoot(t, t.TempDir())
	secret(t, root, pattern(5<<20))
	second := filepath.Join(t.TempDir(), "second")
	if err := os.Link(filepath.Join(root.Name(), "m"), second); err != nil {
		t.Fatal(err)
	}
	if _, err := Encrypt(t.Context(), root, "m", true, nil); err != nil {
		t.Fatal(err)
	}
	onDisk, err := os.ReadFile(second)
	if err != nil || len(onDisk) != HeaderSize+5<<20 || len(bytes.Trim(onDisk, "\x00")) > 0 {
		t.Errorf("%d bytes, %d not overwritten, %v", len(onDisk), len(bytes.Trim(onDisk, "\x00")), err)
	}
}

// A file that stays plain, or is encrypted, is removed without being overwritten:
// that would take as long as writing it.
func TestRemoveOverwritesNothingElse(t *testing.T) {
	root := openRoot(t, t.TempDir())
	second := filepath.Join(t.TempDir(), "second")
	finished(t, root, "m", pattern(1<<20))
	before, err := root.ReadFile("m")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Link(filepath.Join(root.Name(), "m"), second), Remove(root, "m")); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(second); err != nil || !bytes.Equal(before, after) {
		t.Errorf("it was overwritten, %v", err)
	}
}

// encryptAndHang is what the test binary does when it is to be killed: it encrypts
// m in the current directory, and half way it waits.
func encryptAndHang() {
	root, err := os.OpenRoot(".")
	if err != nil {
		panic(err)
	}
	_, err = Encrypt(context.Background(), root, "m", false, func(done, total uint64) {
		if done > total/2 {
			_, _ = os.Stdout.WriteString("half way\n")
			_, _ = io.Copy(io.Discard, os.Stdin)
		}
	})
	panic(err)
}

func TestEncryptKilled(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	plain := secret(t, root, pattern(16<<20))
	cmd := exec.CommandContext(followContext(t), os.Args[0], "encrypt-and-hang")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close() //nolint:errcheck // the process is gone by then
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("half way\n"))); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if stat(t, root, encryptName("m")).Size <= HeaderSize {
		t.Error("it was killed before it had written anything")
	}
	if _, sum, err := Verify(t.Context(), root, "m", nil, nil); err != nil || sum != plain {
		t.Errorf("the plain file: %+v, %v", sum, err)
	}
	if err := Remove(root, "m"); err != nil {
		t.Error(err)
	}
	if left := names(t, root); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestParseKey(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	older := someKey().identities[0]
	k, err := ParseKey(strings.NewReader("# created: today\r\n# public key: x\r\n" + id.String() + "\r\n\n" + older.String()))
	if err != nil || k.Recipient() != id.Recipient().String() || !slices.Equal(k.Recipients(), []string{k.Recipient(), older.Recipient().String()}) {
		t.Errorf("%v, %v", k, err)
	}
	for name, text := range map[string]string{
		"empty": "", "comments": "# nothing\n", "a recipient": id.Recipient().String(), "a typing mistake": id.String()[:70] + "Q",
		"another kind": hybrid.String(), "an SSH key": "-----BEGIN OPENSSH PRIVATE KEY-----", "a huge file": strings.Repeat("#", maxKeyFile+1),
	} {
		_, err := ParseKey(strings.NewReader(text))
		if err == nil {
			t.Errorf("%s was taken for a key", name)
		} else if len(text) > 20 && strings.Contains(err.Error(), text[20:]) {
			t.Errorf("%s: the error quotes it: %v", name, err)
		}
	}
}

// FuzzEncryptedStream decrypts what no vmsnap wrote, under a header that fits it.
func FuzzEncryptedStream(f *testing.F) {
	const length = 70 << 10
	var good bytes.Buffer
	w, err := age.Encrypt(&good, someKey().identities[0].Recipient())
	if err == nil {
		_, err = w.Write(pattern(length))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{}, uint32(0), byte(0))
	f.Add([]byte("age-encryption.org/v1\n-> X25519 "), uint32(30), byte(1))
	f.Add([]byte{}, uint32(good.Len()-1), byte(0x80))
	root := openRoot(f, f.TempDir())
	f.Fuzz(func(t *testing.T, put []byte, at uint32, flip byte) {
		stored := bytes.Clone(good.Bytes())
		at %= uint32(len(stored))
		stored[at] ^= flip
		copy(stored[at:], put)
		sum := Sum{Length: length, Encryption: encryptionAge, Stored: uint64(len(stored)), StoredChecksum: digestOf(stored)}
		block, err := record{Header: secretHeader(), Sum: &sum}.encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := root.WriteFile("m", append(block, stored...), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, _, err = Verify(ctx, root, "m", someKey(), nil)
		if same := bytes.Equal(stored, good.Bytes()); same != (err == nil) || err != nil && !errors.Is(err, ErrAltered) {
			t.Fatalf("the same: %v, %v", same, err)
		}
	})
}
