#!/bin/bash
# Installs and fetches what building and testing need. What is done already is
# not done again, so with nothing missing this takes a fraction of a second.
#
# Installed, when missing: the packages below. Fetched into the cache and not
# installed: a second, newer QEMU and the parts of the test guests (fetch.sh).
# Built there: the guests' kernel and initramfs (guest.sh), and a Debian to test
# packages in (tree.sh). The cache is .cache, or where VMSNAP_CACHE says.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    binutils busybox-static ca-certificates curl e2fsprogs gcc libc6-dev
    libprotobuf-dev libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu lz4
    mmdebstrap prometheus protobuf-compiler qemu-system-x86
    qemu-utils rpm seabios socat strace systemd systemd-container
)

VMSNAP_CACHE=${VMSNAP_CACHE:-$PWD/.cache}
export VMSNAP_CACHE
mkdir -p "$VMSNAP_CACHE"

# One at a time: two runs would fetch and build over each other.
exec 9>"$VMSNAP_CACHE/deps.lock"
flock 9

installed() {
    dpkg-query -W -f '${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p' | sort -u
}

install_missing() {
    local missing
    missing=$(comm -13 <(installed) <(printf '%s\n' "$@" | sort -u))
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "deps: run as root, or install:" $missing >&2
        exit 1
    fi
    echo "deps: installing" $missing
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
}

# stamped NAME SCRIPT FILE…: runs a script, and then not again until it or one
# of the files it depends on changes.
stamped() {
    local stamp=$VMSNAP_CACHE/$1.stamp script=$2 hash
    hash=$(cat "${@:2}" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
        return 0
    fi
    rm -f "$stamp"
    "$script"
    echo "$hash" >"$stamp"
}

install_missing "${packages[@]}"
stamped fetch hack/fetch.sh
install_missing $(cat "$VMSNAP_CACHE/libraries")
stamped guest hack/guest.sh "$VMSNAP_CACHE/fetch.stamp" \
    $(find internal/testvm/guest internal/testvm/wire -name '*.go' ! -name '*_test.go' | sort)
stamped tree hack/tree.sh
