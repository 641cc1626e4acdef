#!/bin/bash
# Fetches into $VMSNAP_CACHE, without installing anything:
#   qemu10/     QEMU 10 of this release's backports, to test beside the installed one
#   agent-7.2/  the guest agent of the installed QEMU's release
#   agent-10/   the guest agent of QEMU 10
#   kernel/     the kernel of the test guests
#   libraries   the libraries that QEMU 10 needs, one package a line
# The package sources are those of the machine, with the backports added.
set -euo pipefail

cache=${VMSNAP_CACHE:?}
. /etc/os-release
if [ "$VERSION_CODENAME" != bookworm ]; then
    echo "fetch: the two QEMU versions are those of Debian 12, this is $PRETTY_NAME" >&2
    exit 1
fi
backports=$VERSION_CODENAME-backports

work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/sources" "$work/debs"

# copy_sources copies the machine's sources, and those that name the release's
# own suite once more with the backports in its place. Both forms that apt
# knows are read: stanzas (.sources) and lines (.list).
copy_sources() {
    local file name
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
        [ -f "$file" ] || continue
        name=$(basename "$file")
        case $file in
        *.sources)
            cp "$file" "$work/sources/$name"
            awk -v RS= -v ORS='\n\n' -v release="$VERSION_CODENAME" -v suite="$backports" '
                $0 ~ "(^|\n)Suites:[^\n]*[ \t]" release "([ \t\n]|$)" {
                    sub("(^|\n)Suites:[^\n]*", "\nSuites: " suite)
                    sub("^\n", "")
                    print
                }' "$file" >"$work/sources/backports-$name"
            ;;
        *.list)
            cp "$file" "$work/sources/$name"
            awk -v release="$VERSION_CODENAME" -v suite="$backports" '
                $1 == "deb" && sub(" " release " ", " " suite " ")
                ' "$file" >"$work/sources/backports-$name"
            ;;
        esac
    done
}

# apt TOOL ARG…: runs an apt tool on these sources, away from the machine's own
# lists.
apt() {
    "apt-$1" -q -o Dir::State::Lists="$work/lists" \
        -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/sources" \
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User=root "${@:2}"
}

# unpack DIRECTORY PACKAGE…: downloads packages and unpacks them there.
unpack() {
    local target=$work/unpacked/$1 package
    mkdir -p "$target"
    for package in "${@:2}"; do
        (cd "$work/debs" && rm -f ./*.deb && apt get download "$package" && dpkg -x ./*.deb "$target")
    done
}

copy_sources
apt get update

unpack qemu10 {qemu-system-x86,qemu-system-common,qemu-system-data,qemu-utils}/"$backports"
unpack agent-7.2 "qemu-guest-agent/$VERSION_CODENAME"
unpack agent-10 "qemu-guest-agent/$backports"
kernel=$(apt cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" && !found {found = 1; print $2}')
unpack kernel "${kernel:?no cloud kernel found}"

apt cache show {qemu-system-x86,qemu-utils}/"$backports" |
    sed -n 's/^Depends: //p' | tr ',|' '\n\n' | awk '/^ *lib/ {print $1}' | sort -u >"$work/libraries"

for part in qemu10 agent-7.2 agent-10 kernel; do
    rm -rf "${cache:?}/$part"
    mv "$work/unpacked/$part" "$cache/$part"
done
mv "$work/libraries" "$cache/libraries"
