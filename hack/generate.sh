#!/bin/bash
# Generates the Go code of the API from api/vmsnap/v1/*.proto. The code is made
# in a temporary directory and replaces the old only when all of it was made, so
# a mistake in a .proto file does not leave the tree without its API.
set -euo pipefail
cd "$(dirname "$0")/.."

module=github.com/vmsnap/vmsnap
package=api/vmsnap/v1

# -n prints where the tool was built instead of running it.
tool() { go tool -modfile=tools/go.mod -n "$1"; }

gen_go=$(tool protoc-gen-go)
gen_connect=$(tool protoc-gen-connect-go)

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

protoc -I api \
    --plugin=protoc-gen-go="$gen_go" \
    --go_out="$out" --go_opt=module="$module" \
    --plugin=protoc-gen-connect-go="$gen_connect" \
    --connect-go_out="$out" --connect-go_opt=module="$module" \
    "$package"/*.proto

rm -rf "$package"/*.pb.go "$package"/vmsnapv1connect
cp -r "$out/$package/." "$package/"
