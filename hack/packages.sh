#!/bin/bash
# Builds the Debian and the RPM package: packages.sh DIRECTORY [VERSION]
# Without a version, it is the newest tag's with what came after, in a form that
# sorts behind the tag and before the next one.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: packages.sh DIRECTORY [VERSION]}
mkdir -p "$out"
described() {
    local tag count hash
    if [[ $(git describe --tags --long --match 'v[0-9]*' 2>/dev/null) =~ ^v(.*)-([0-9]+)-g([0-9a-f]+)$ ]]; then
        tag=${BASH_REMATCH[1]} count=${BASH_REMATCH[2]} hash=${BASH_REMATCH[3]}
    else
        tag=0.0.0 count=$(git rev-list --count HEAD) hash=$(git rev-parse --short HEAD)
    fi
    [ "$count" = 0 ] && echo "$tag" || echo "$tag+$count.g$hash"
}
VERSION=${2:-$(described)}
ARCH=$(go env GOARCH)
# Files bear the time of the commit, so that the same source makes the same
# package.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
export VERSION ARCH STAGE SOURCE_DATE_EPOCH CGO_ENABLED=0
unset VMSNAP_SOCKET # it would show as a default in the manual

go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o "$STAGE/bin/" ./cmd/...
mkdir "$STAGE"/man{1,8}
go run -tags man ./cmd/vmsnap "$STAGE/man1"
go run -tags man ./cmd/vmsnapd "$STAGE/man8"
gzip -9n "$STAGE"/man?/*
for shell in bash zsh fish; do
    "$STAGE/bin/vmsnap" completion "$shell" >"$STAGE/vmsnap.$shell"
done
# What each program is made of, as it says itself.
for program in vmsnap vmsnapd; do
    GOFLAGS=-trimpath go tool -modfile=tools/go.mod cyclonedx-gomod bin -json -std -noserial -notimestamp \
        -version "v$VERSION" -output "$STAGE/$program.cdx.json" "$STAGE/bin/$program" 2>"$STAGE/sbom.log" ||
        { cat "$STAGE/sbom.log" >&2; exit 1; }
done
for packager in deb rpm; do
    go tool -modfile=tools/go.mod nfpm package --config packaging/nfpm.yaml --packager "$packager" --target "$out/"
done
