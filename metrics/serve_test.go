package metrics

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/crypto/bcrypt"
)

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// heard closes a channel when a message is logged.
type heard struct {
	hclog.Logger
	message string
	closed  chan struct{}
}

func (h heard) Log(_ hclog.Level, msg string, _ ...any) {
	if strings.HasPrefix(msg, h.message) {
		close(h.closed)
	}
}

// serving serves until the test ends, and returns when connections are taken.
func serving(t *testing.T, address, config string) {
	t.Helper()
	log := heard{hclog.NewNullLogger(), "TLS is disabled", make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- New("1").Serve(ctx, address, config, log) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	select {
	case <-log.closed:
	case err := <-done:
		t.Fatalf("serve: %v", err)
	}
}

func get(t *testing.T, url, user, password string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

func TestServe(t *testing.T) {
	address := freeAddress(t)
	serving(t, address, "")
	if code, body := get(t, "http://"+address+"/metrics", "", ""); code != 200 || !strings.Contains(body, "vmsnap_build_info") {
		t.Errorf("got %d and %.200q", code, body)
	}
	if code, _ := get(t, "http://"+address+"/", "", ""); code != 404 {
		t.Errorf("another path gives %d", code)
	}
}

func TestServeWithPassword(t *testing.T) {
	address := freeAddress(t)
	config := filepath.Join(t.TempDir(), "web.yml")
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, fmt.Appendf(nil, "basic_auth_users:\n  prom: %s\n", hash), 0o600); err != nil {
		t.Fatal(err)
	}
	serving(t, address, config)
	for password, want := range map[string]int{"secret": 200, "wrong": 401} {
		if code, _ := get(t, "http://"+address+"/metrics", "prom", password); code != want {
			t.Errorf("the password %q gives %d", password, code)
		}
	}
}

func TestServeErrors(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	broken := filepath.Join(t.TempDir(), "web.yml")
	if err := os.WriteFile(broken, []byte("no_such_setting: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ address, config, want string }{
		"address in use": {taken.Addr().String(), "", "address already in use"},
		"wrong setting":  {"127.0.0.1:0", broken, "no_such_setting"},
		"no such file":   {"127.0.0.1:0", "/nonexistent.yml", "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			err := New("1").Serve(t.Context(), c.address, c.config, hclog.NewNullLogger())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v; want %q", err, c.want)
			}
		})
	}
}
