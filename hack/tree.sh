#!/bin/bash
# Makes $VMSNAP_CACHE/tree: a small Debian, of the machine's own release and
# sources, that systemd boots in, with QEMU. Tests of the packages run there.
set -euo pipefail

cache=${VMSNAP_CACHE:?}
. /etc/os-release
mirror=$(apt-get indextargets --format '$(REPO_URI)' "Created-By: Packages" "Release: $VERSION_CODENAME" | head -1)
rm -rf "$cache/tree" "$cache/tree.new"
trap 'rm -rf "$cache/tree.new"' EXIT
mmdebstrap --quiet --variant=minbase --aptopt='APT::Install-Recommends "false"' \
    --include=systemd,systemd-sysv,dbus,procps,qemu-system-x86,qemu-utils \
    "$VERSION_CODENAME" "$cache/tree.new" "${mirror:?no source of $VERSION_CODENAME found}"
mv "$cache/tree.new" "$cache/tree"
