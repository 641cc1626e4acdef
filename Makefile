# Everything that is fetched or built for tests lands in .cache (VMSNAP_CACHE
# puts it elsewhere); what is built for use lands in bin.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

export CGO_ENABLED := 0

GOTOOL := go tool -modfile=tools/go.mod
FUZZTIME ?= 10s
TORTUREROUNDS ?= 200
# The race detector watches everything but SQLite itself, which was translated
# from C, would take most of the time, and is guarded by database/sql, and the
# compression, which would starve the guests beside it. No more than these: what
# others instantiate of the standard library's generic code would be linked,
# unwatched, for all. Nor are the pointers checked that the translation makes of
# integers.
RACE := -race "-gcflags=modernc.org/...=-d=checkptr=0" "-gcflags=modernc.org/sqlite/lib=-race=false" "-gcflags=github.com/klauspost/compress/...=-race=false"
# Real guests take memory and cores, so few packages run at a time; testvm
# itself limits how many guests run beside each other. Results are not cached:
# the tests start programs that the cache does not know of.
TESTFLAGS ?= -p 2 -parallel 4 -timeout 60m -count=1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install and fetch what building and testing need (quick when nothing is missing)
	@hack/deps.sh

.PHONY: build
build: ## build bin/vmsnapd and bin/vmsnap
	go build -trimpath -ldflags "-X main.version=$$(git describe --tags --always --dirty 2>/dev/null || echo devel)" -o bin/ ./cmd/...

.PHONY: packages
packages: ## build the Debian and the RPM package in dist/
	@hack/packages.sh dist

.PHONY: demo
demo: deps build ## show snapshots of a real guest from end to end
	go run ./internal/demo

.PHONY: test
test: deps build lint race ## build, lint, and run every test, on real guests and with the race detector

.PHONY: race
race: deps ## run every test with the race detector
	@hack/race.sh $(RACE) -- $(TESTFLAGS)

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (default 10s)
	@hack/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: ## check style, mistakes and the import law
	$(GOTOOL) golangci-lint run

.PHONY: vuln
vuln: build ## tell which known vulnerabilities the programs have (asks vuln.go.dev, or VULNDB)
	$(GOTOOL) govulncheck -mode=binary $(if $(VULNDB),-db=$(VULNDB)) bin/vmsnapd
	$(GOTOOL) govulncheck -mode=binary $(if $(VULNDB),-db=$(VULNDB)) bin/vmsnap

.PHONY: generate
generate: ## generate the Go code of the API from its .proto files
	@hack/generate.sh

.PHONY: bench
bench: deps build ## measure vmsnap against its rivals on the same guest
	go run ./bench

.PHONY: torture
torture: deps ## kill the agent and QEMU at each step and at TORTUREROUNDS random moments (default 200)
	CGO_ENABLED=1 go test $(RACE) -v -run 'Torture|Killed|Interrupted|LaunchersOfSystemd' -count=1 -timeout 180m ./internal/e2e ./packaging -args -torture.rounds=$(TORTUREROUNDS)
