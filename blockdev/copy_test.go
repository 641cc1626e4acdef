package blockdev

import "testing"

func TestImageName(t *testing.T) {
	chain := []imageFile{{"/proc/self/fd/4", "qcow2", false}, {"/proc/self/fd/5", "qcow2", false}, {"/proc/self/fd/6", "raw", true}}
	for want, files := range map[string][]imageFile{
		`json:{"backing":{"backing":{"driver":"raw","file":{"driver":"host_device","filename":"/proc/self/fd/6","locking":"off","read-only":true},"read-only":true},` +
			`"driver":"qcow2","file":{"driver":"file","filename":"/proc/self/fd/5","locking":"off","read-only":true},"read-only":true},` +
			`"driver":"qcow2","file":{"driver":"file","filename":"/proc/self/fd/4","locking":"off","read-only":true},"read-only":true}`: chain,
		// One that lies on nothing says so: what its header names is not opened.
		`json:{"backing":null,"driver":"qcow2","file":{"driver":"file","filename":"/proc/self/fd/4","locking":"off","read-only":true},"read-only":true}`: chain[:1],
		`json:{"driver":"raw","file":{"driver":"host_device","filename":"/proc/self/fd/6","locking":"off","read-only":true},"read-only":true}`:           chain[2:],
	} {
		if got, err := imageName(files); err != nil || got != want {
			t.Errorf("got  %s, %v\nwant %s", got, err, want)
		}
	}
	if _, err := imageName([]imageFile{chain[2], chain[0]}); err == nil {
		t.Error("a raw image lies on another one")
	}
}
