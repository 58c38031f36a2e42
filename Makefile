# Needs Python 3.10 or newer and make; everything else is installed into .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

SEEDS ?= 10000
FUZZ_S ?= 60
FIRST ?=
SEED ?=
MINUTES ?= 10

# A new local Ray otherwise asks every process for a token.
TEST_ENV := RAY_AUTH_MODE=disabled
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo)
# pytest's exit status 5: nothing was selected.
NONE_IS_FINE := || { status=$$?; [ $$status -eq 5 ] && echo "no such tests"; }

.PHONY: help demo demo-pipeline test test-long test-gpu lint format sim fuzz bench-observe bench-recovery bench-pipeline bench-snapshot bench-durable bench-scale bench-watch soak clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.test-stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]" -c constraints.txt
	touch $@

$(VENV)/.lint-stamp: $(VENV)/.test-stamp
	$(PIP) -e ".[test,lint]" -c constraints.txt
	touch $@

# For tests of a lost cluster head. The system's own service is not used, and need not run.
$(VENV)/.redis-stamp: $(VENV)/.test-stamp
	@command -v redis-server >/dev/null || { $(AS_ROOT) apt-get update -qq && \
	  $(AS_ROOT) env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server; } || \
	  { echo "some long tests need redis-server, and it could not be installed: install it, and make sure that it is in PATH"; exit 1; }
	touch $@

# For tests of the live page in a browser.
$(VENV)/.chromium-stamp: $(VENV)/.test-stamp
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { $(AS_ROOT) apt-get update -qq && \
	  $(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } || \
	  { echo "some long tests need chromium, and it could not be installed: install it, and make sure that it is in PATH"; exit 1; }
	touch $@

# Kubernetes' schemas are large, and only long tests need them.
$(VENV)/.manifests-stamp: $(VENV)/.test-stamp
	$(PIP) -e ".[test,manifests]" -c constraints.txt
	touch $@

# For tests of rules and dashboard: the program alone, the system's own service need not run.
$(VENV)/.prometheus-stamp: $(VENV)/.test-stamp
	@{ command -v prometheus && command -v promtool; } >/dev/null || { $(AS_ROOT) apt-get update -qq && \
	  $(AS_ROOT) env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus; } || \
	  { echo "some long tests need prometheus and promtool, and they could not be installed: install them, and make sure that they are in PATH"; exit 1; }
	touch $@

demo: $(VENV)/.test-stamp ## train, kill processes on the way, compare the bits
	$(BIN)/resilient demo

demo-pipeline: $(VENV)/.test-stamp ## the same with the model's layers spread over the ranks
	$(BIN)/resilient demo --pipeline --out out/demo-pipeline

test: $(VENV)/.test-stamp ## all tests but the long ones and those that need a GPU
	$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu and not long"

LONG_STAMPS := $(VENV)/.redis-stamp $(VENV)/.chromium-stamp $(VENV)/.prometheus-stamp $(VENV)/.manifests-stamp

test-long: $(LONG_STAMPS) ## tests that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m "long and not gpu" $(NONE_IS_FINE)

test-gpu: $(VENV)/.test-stamp ## tests that need one NVIDIA GPU, with its figures, within six minutes
	$(TEST_ENV) timeout 360 $(BIN)/python -m pytest -m gpu tests/gpu -s --durations=0

lint: $(VENV)/.lint-stamp ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: $(VENV)/.lint-stamp ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sim: $(VENV)/.test-stamp ## simulate a cluster and its faults: SEEDS=n FIRST=n, or one SEED=n
	$(BIN)/python -m tests.sim --seeds $(SEEDS) $(if $(FIRST),--first $(FIRST)) $(if $(SEED),--seed $(SEED))

soak: $(VENV)/.test-stamp ## hit a real run for a while, compare its bits, look for leaks: MINUTES=n SEED=n
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(or $(SEED),1)

fuzz: $(VENV)/.test-stamp ## feed damaged manifests to their readers: FUZZ_S=seconds
	$(PIP) -e ".[test,fuzz]" -c constraints.txt
	mkdir -p out/fuzz
	$(BIN)/python -m tests.fuzz.manifests -max_total_time=$(FUZZ_S) out/fuzz

bench-observe: $(VENV)/.test-stamp ## what scraping and an open page cost a run
	$(BIN)/python -m benchmarks.observe

bench-recovery: $(VENV)/.test-stamp ## time recoveries, written to out/bench/recovery.json
	$(BIN)/python -m benchmarks.recovery

bench-pipeline: $(VENV)/.test-stamp ## throughput after losing ranks of a pipeline, beside others' ways
	$(BIN)/python -m benchmarks.pipeline

bench-snapshot: $(VENV)/.test-stamp ## time snapshots beside others', written to out/bench/snapshot.json
	$(BIN)/python -m benchmarks.snapshot

bench-durable: $(VENV)/.test-stamp ## time checkpoints on disk beside others', written to out/bench/durable.json
	$(BIN)/python -m benchmarks.durable

bench-watch: $(VENV)/.test-stamp ## what the watch over state takes of a step, written to out/bench/watch.json
	$(BIN)/python -m benchmarks.watch

bench-scale: $(VENV)/.test-stamp ## time the controller's core at up to 10,000 nodes, written to out/bench/scale.json
	$(BIN)/python -m benchmarks.scale

clean: ## remove outputs and caches, keep .venv
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
