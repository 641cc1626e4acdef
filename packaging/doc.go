// Package packaging holds what the Debian and the RPM package are made from
// (hack/packages.sh), and the tests of both. The Debian package is installed,
// used, upgraded and purged in a tree of its own that systemd boots in, with a
// real guest beside the daemon; the scriptlets of the RPM package are run in an
// empty root.
package packaging
