# The build, for people. Every target installs what it needs by itself (see `deps`).
# Versions: Go modules in go.mod and scripts/components/*/go.mod, C sources in
# scripts/components/dqlite, Debian packages in scripts/deps. How third-party programs are
# built: scripts/catalog.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Release builds carry no path of the machine, no state of the checkout, and one time: the
# commit's (docs/supply-chain.md).
# With VERBOSE=-v the go command names each package that it compiles; scripts/build counts them.
export GOFLAGS := $(strip -trimpath -buildvcs=false $(VERBOSE))
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

BIN  := build/bin
SNAP := build/snap
KUBE := $(shell awk '$$1=="k8s.io/kubernetes"{print $$2; exit}' go.mod)

# Kubernetes reports the version it is told at link time.
VERSION_PKGS := k8s.io/component-base/version k8s.io/client-go/pkg/version
LDFLAGS := -s -w $(foreach p,$(VERSION_PKGS),-X $(p).gitVersion=$(KUBE) -X $(p).gitMajor=$(word 1,$(subst ., ,$(KUBE:v%=%))) -X $(p).gitMinor=$(word 2,$(subst ., ,$(KUBE:v%=%))) -X $(p).gitTreeState=clean)

##@ Use

.PHONY: help
help: ## List the targets
	@awk 'BEGIN{FS=":.*## "} /^##@/{printf "\n%s\n", substr($$0,5)} /^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

.PHONY: run
run: ## Start a cluster in the lab (NODES=1 WORKERS=0) and say what to type next
	@scripts/build run $(or $(NODES),1) $(or $(WORKERS),0)

.PHONY: stop
stop: ## Remove the nodes that `make run` started, with every trace
	scripts/run down

##@ Build

.PHONY: deps
deps: ## Install missing Debian or Ubuntu packages; build libdqlite
	@scripts/deps

.PHONY: build
build: ## Build everything: build/bin and the tree of the snap in build/snap
	@scripts/build all

.PHONY: snap
snap: build ## Pack build/snap into build/microk8s_<version>_<arch>.snap, with its bill of materials
	@scripts/deps snap
	@scripts/pack build
	@go run ./scripts/sbom --tree $(SNAP) --out build

.PHONY: sbom
sbom: build ## Write the bill of materials: build/microk8s_<version>_<arch>.{spdx,cdx}.json
	@go run ./scripts/sbom --tree $(SNAP) --out build

RELEASE = $(wildcard build/microk8s_*.snap build/microk8s_*.spdx.json build/microk8s_*.cdx.json $(addprefix build/packs/*.,tar tar.gz tar.zst spdx.json cdx.json))
.PHONY: sign
sign: ## Sign the snap, its bill of materials and packs with a key file (KEY=FILE)
	@go run ./scripts/sign --key "$(KEY)" $(RELEASE)

.PHONY: verify
verify: ## Verify those signatures (PUB=FILE)
	@go run ./scripts/sign --public "$(PUB)" $(RELEASE)

.PHONY: programs
programs: deps ## Build our own programs into build/bin
	@mkdir -p $(BIN)
	@scripts/console --changed
	CGO_ENABLED=0 go build -tags nosqlite3 -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/microk8s ./cmd/cluster-agent ./cmd/apiserver-proxy ./cmd/supervisor ./cmd/lab ./cmd/kubelite
	scripts/components/dqlite/gobuild $(BIN)/k8s-dqlite ./cmd/k8s-dqlite

.PHONY: console
console: deps ## Build the page of the console (console/) with npm into internal/console, which embeds it
	@scripts/console

.PHONY: components
components: deps ## Build the third-party programs from their pinned modules (scripts/catalog)
	@go run ./scripts/components $(WHICH)
	@scripts/components/nft/build build/components/nft

.PHONY: peers
peers: deps build/haproxy/haproxy ## Get what we are compared with: etcd, kine on SQLite, HAProxy
	@go run ./scripts/components peer

build/haproxy/haproxy: scripts/components/haproxy/build | deps
	scripts/components/haproxy/build build/haproxy

# One of them: the program itself finds out whether it is up to date.
build/peers/%.stamp: always | deps
	@go run ./scripts/components $*
.PHONY: always
always:

.PHONY: images
images: deps ## Build the container images that travel with the product, and those of the tests
	@scripts/console --changed
	@$(if $(BUILT),,go run ./scripts/components image)
	@go run ./scripts/images --out build/images --test-out build/test-images $(if $(BUILT),--built)

.PHONY: tree
tree: ## Make build/snap of what is built already
	@go run ./scripts/snaptree --out $(SNAP) $(if $(BUILT),--built)

.PHONY: addons
addons: deps ## Build the packs of the larger addons into build/packs, with their bill of materials
	@go run ./scripts/components pack
	@go run ./scripts/images --packs build/packs
	@go run ./scripts/sbom --packs build/packs

.PHONY: clean
clean: ## Remove build/ (nodes of the lab must be down)
	rm -rf build

##@ Check

.PHONY: test
test: deps ## The gate: unit, command line and node tests (root; 25 to 50 minutes)
	scripts/test gate

.PHONY: test-unit
test-unit: deps ## Tests that need no node: a few minutes
	scripts/test unit

.PHONY: test-long
test-long: deps ## Everything, with every seed and every case
	scripts/test long

.PHONY: fuzz
fuzz: deps ## Fuzz every decoder, each for TIME (10s)
	scripts/fuzz $(or $(TIME),10s)

.PHONY: bench
bench: build addons $(if $(filter addons network,$(MAKECMDGOALS)),,peers) ## Measure against the budgets; prints tables; make bench addons|network: one of them only
	scripts/bench $(filter addons network,$(MAKECMDGOALS))
.PHONY: network
network: # of make bench network
	@:

.PHONY: lint
lint: deps ## Linters for Go and shell; snapcraft.yaml
	scripts/lint

.PHONY: vuln
vuln: build ## Known vulnerabilities in every program that is shipped (DB=FOLDER without internet)
	@go run ./scripts/vuln --db "$(DB)"

.PHONY: reproducible
reproducible: deps ## Build twice, in two clean clones, and compare every file
	scripts/reproducible
