#!/bin/bash
# Runs every test with the race detector: race.sh RACEFLAG... -- TESTFLAG...
#
# The schedules' year only computes, and goes without. The test of retention
# waits for minutes while next to nothing happens: it runs beside the others.
set -euo pipefail
cd "$(dirname "$0")/.."

race=()
while [ "$1" != -- ]; do
    race+=("$1")
    shift
done
shift

aside=TestQEMURetention
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export CGO_ENABLED=1
go test "${race[@]}" -c -o "$dir/e2e.test" ./internal/e2e
(cd internal/e2e && exec "$dir/e2e.test" -test.run "^$aside\$" -test.count=1 -test.timeout=30m -test.v) >"$dir/log" 2>&1 &
beside=$!

failed=0
go test "${race[@]}" "$@" -skip "^$aside\$" $(go list ./... | grep -v /agent/schedule) || failed=1
CGO_ENABLED=0 go test "$@" ./agent/schedule || failed=1
wait "$beside" || failed=1
cat "$dir/log"
grep -q "^--- PASS: $aside " "$dir/log" || failed=1
exit "$failed"
