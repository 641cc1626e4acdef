package docs_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// guestHook runs one of the guest's hooks, with a client that imitates the
// database's.
func guestHook(t *testing.T, name, client, verb string, env ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "fsfreeze-hooks/"+name, verb)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "VMSNAP_PSQL=" + client, "VMSNAP_MYSQL=" + client}, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func database(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "client")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPostgreSQLHook(t *testing.T) {
	noted := filepath.Join(t.TempDir(), "noted")
	psql := database(t, `echo "$@" >>`+noted)
	for _, verb := range []string{"freeze", "thaw"} {
		if out, err := guestHook(t, "10-postgresql", psql, verb); err != nil {
			t.Errorf("%s: %v, %s", verb, err, out)
		}
	}
	if b, err := os.ReadFile(noted); err != nil || string(b) != "-X -q -d postgres -c CHECKPOINT\n" {
		t.Errorf("the client was called with %q, %v", b, err)
	}
	if _, err := guestHook(t, "10-postgresql", database(t, "exec sleep 100"), "freeze", "VMSNAP_LIMIT=0.2"); err == nil {
		t.Error("a database that hangs does not fail the hook")
	}
}

func TestMySQLHook(t *testing.T) {
	dir := t.TempDir()
	run, noted := filepath.Join(dir, "run"), filepath.Join(dir, "noted")
	env := []string{"VMSNAP_RUN=" + run, "VMSNAP_LIMIT=1"}
	// Its session holds the lock until its input ends.
	mysql := database(t, `read -r line; echo "$line" >`+noted+`; echo vmsnap-locked; exec cat >/dev/null`)
	lives := func(session []byte) bool {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(session)) + "/stat")
		return err == nil && !strings.Contains(string(stat), ") Z ")
	}
	held := func() bool {
		session, err := os.ReadFile(filepath.Join(run, "session"))
		return err == nil && lives(session)
	}
	// The session is told to end, and ends when it gets a CPU.
	ends := func(holds func() bool, what string) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); holds(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	if out, err := guestHook(t, "20-mysql", mysql, "freeze", env...); err != nil || !held() {
		t.Fatalf("freeze: %v, %s, held %t", err, out, held())
	}
	if b, err := os.ReadFile(noted); err != nil || !strings.Contains(string(b), "lock_wait_timeout=1; FLUSH TABLES WITH READ LOCK;") {
		t.Errorf("the session was given %q, %v", b, err)
	}
	session, err := os.ReadFile(filepath.Join(run, "session"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := guestHook(t, "20-mysql", mysql, "thaw", env...); err != nil {
		t.Errorf("thaw: %v, %s", err, out)
	}
	ends(func() bool { return lives(session) }, "the lock is held after the thaw")
	if _, err := os.Stat(run); err == nil {
		t.Error("the hook left its directory")
	}
	// One whose thaw never comes.
	if out, err := guestHook(t, "20-mysql", mysql, "freeze", append(env, "VMSNAP_HOLD=0.3")...); err != nil {
		t.Errorf("freeze: %v, %s", err, out)
	}
	ends(held, "a lock that nobody ends is held for ever")
	for what, script := range map[string]string{
		"a lock that is not had":       "echo 'ERROR 1205: Lock wait timeout exceeded' >&2; exit 1",
		"a server that does not reply": "exec cat >/dev/null",
	} {
		if out, err := guestHook(t, "20-mysql", database(t, script), "freeze", env...); err == nil || !strings.Contains(out, "the tables are not locked") {
			t.Errorf("%s: %v, %s", what, err, out)
		}
		ends(held, what+": a session is left")
	}
}
