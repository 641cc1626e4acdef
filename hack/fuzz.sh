#!/bin/bash
# Runs each fuzz target of the module for the given time: fuzz.sh 10s
set -euo pipefail
cd "$(dirname "$0")/.."

time=${1:?usage: fuzz.sh DURATION}
found=0
for package in $(go list ./...); do
    listed=$(go test -list '^Fuzz' "$package")
    # -list also prints a closing line for each package.
    for target in $(grep '^Fuzz' <<<"$listed" || true); do
        found=$((found + 1))
        echo "fuzz $package $target $time"
        go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package"
    done
done
if [ "$found" = 0 ]; then
    echo "no fuzz target found" >&2
    exit 1
fi
