#!/bin/bash
# Runs each fuzz target of the module for the given time: fuzz.sh 10s
set -euo pipefail
cd "$(dirname "$0")/.."

time=${1:?usage: fuzz.sh DURATION}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# fuzz PACKAGE TARGET. Before Go 1.27 the end of the time can itself be reported
# as a failure, when it comes while an input is being tried. That is told from a
# finding by what is said: a finding always names its input.
fuzz() {
    echo "fuzz $1 $2 $time"
    if go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" "$1" 2>&1 | tee "$log"; then
        return 0
    fi
    if grep -qx ' *context deadline exceeded' "$log" && ! grep -q 'Failing input' "$log"; then
        echo "fuzz $1 $2: nothing found in $time"
        return 0
    fi
    return 1
}

targets=0
failed=0
for package in $(go list ./...); do
    listed=$(go test -list '^Fuzz' "$package")
    # -list also prints a closing line for each package.
    for target in $(grep '^Fuzz' <<<"$listed" || true); do
        targets=$((targets + 1))
        fuzz "$package" "$target" || failed=$((failed + 1))
    done
done
echo "$((targets - failed)) passed, $failed failed"
[ "$targets" -gt 0 ] && [ "$failed" = 0 ]
