package testvm

import "testing"

// ForEachQEMU runs f as a parallel subtest, "qemu-7.2" and "qemu-10", for each
// version of QEMU. Each waits for its turn before f begins.
func ForEachQEMU(t *testing.T, f func(t *testing.T, q QEMU)) {
	t.Helper()
	versions, err := Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run("qemu-"+q.Name, func(t *testing.T) {
			t.Parallel()
			takeSlot(t)
			f(t, q)
		})
	}
}

// OnOneQEMU runs a test, in parallel, whose outcome does not depend on QEMU's
// version: it is given the newest.
func OnOneQEMU(t *testing.T, f func(t *testing.T, q QEMU)) {
	t.Helper()
	versions, err := Versions()
	if err != nil {
		t.Fatal(err)
	}
	t.Parallel()
	takeSlot(t)
	f(t, versions[len(versions)-1])
}

// Start launches a guest for a test. When the test ends the guest is killed, its
// directory is removed if Start made it, and the test fails if a QEMU with the
// guest's UUID is left. The newest QEMU is taken if none is given.
//
// Start waits for its turn, unless the test or one above it has it already. The
// logs of the guest of a failed test are shown.
func Start(t testing.TB, c Config) *Guest {
	t.Helper()
	takeSlot(t)
	return StartAside(t, c)
}

// StartAside is Start for a test that waits for minutes while its guest does next
// to nothing: it takes no turn from the others.
func StartAside(t testing.TB, c Config) *Guest {
	t.Helper()
	if c.QEMU.Binary == "" {
		versions, err := Versions()
		if err != nil {
			t.Fatal(err)
		}
		c.QEMU = versions[len(versions)-1]
	}
	ours := c.Dir == ""
	g, err := Launch(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("guest %s:%s", g.Name, g.logs())
		}
		g.Kill()
		if err := killLeftovers(g.UUID); err != nil {
			t.Errorf("guest %s: %v", g.Name, err)
		}
		if !ours {
			return
		}
		if err := RemoveAll(g.Dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return g
}
