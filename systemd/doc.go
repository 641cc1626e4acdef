// Package systemd is what vmsnapd and systemd have to say to each other: that
// the daemon is ready, reloads or stops (sd_notify(3)), that it is alive
// (sd_watchdog_enabled(3)), the socket that systemd listens on for it
// (sd_listen_fds(3)), the secrets that it hands over (CREDENTIALS_DIRECTORY in
// systemd.exec(5)), the journal (systemd.journal-fields(7)), and the units of
// VMs, which Units starts and stops for it over D-Bus. The unit files and what
// goes with them stand beside the code; packages install them from here.
//
// Without systemd everything here does nothing, and says so by its result.
//
// Listener is called once, before other descriptors are opened. All else is
// safe for concurrent use.
package systemd
