# make reproduce [PROFILE=auto] [RUN=artifact/runs/mine] [VERBOSE=1]    the four notebooks, figures and report
# make replay        the same from the reference records, measuring nothing
# make test | test-fast | lint | env | lock | clean
# PYTHON=python3.12 chooses the interpreter that the environment is made with.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
PROFILE ?= auto
RUN ?=
VERBOSE ?=
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help reproduce replay test test-fast lint env lock clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

reproduce: env ## Run the four notebooks in order and write figures and report (PROFILE=, RUN=, VERBOSE=1)
	@$(BIN)/djinn reproduce --profile '$(PROFILE)' $(if $(RUN),--run-dir '$(RUN)') $(if $(VERBOSE),--verbose)

replay: env ## Draw the reference records' figures, claims and reports again (no GPU, a minute)
	@$(BIN)/djinn replay

test: env ## Run the whole test suite (WORKERS=, 2 by default: files of tests that run at once)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-fast: env ## Run all tests but the slow ones (a few minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m 'not slow'

lint: env ## Check style and types
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(INSTALLED) ## Create .venv with the pinned dependencies (PYTHON=)

$(INSTALLED): requirements.lock pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	    command -v '$(PYTHON)' >/dev/null || { echo "make: no $(PYTHON); djinn needs Python 3.11 or later" >&2; exit 1; }
	    '$(PYTHON)' -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: djinn needs Python 3.11 or later; $(PYTHON) is %d.%d.%d; name another: make PYTHON=python3.12" % sys.version_info[:3])'
	    '$(PYTHON)' -m venv .venv
	fi
	libaio() { printf '#include <libaio.h>\n' | c++ -x c++ -fsyntax-only - 2>/dev/null; }
	if ! libaio && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    echo "Installing libaio-dev, which DeepSpeed's NVMe offload is compiled with"
	    { apt-get update -qq && apt-get install -y -qq libaio-dev; } >/dev/null || true
	fi
	libaio || echo "Note: no C++ compiler with libaio headers (Debian: g++ libaio-dev; Fedora: gcc-c++ libaio-devel):" \
	    "DeepSpeed's NVMe rows will read 'unavailable'"
	echo "Installing the pinned dependencies into .venv (a few minutes)"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq --requirement requirements.lock
	$(BIN)/python -m pip install -qq --no-deps --editable .
	touch $@

lock: env ## Resolve requirements.lock again; versions already in it stay where they can
	@$(BIN)/python -m pip install -qq uv
	new=$$(mktemp)
	trap 'rm -f "$$new"' EXIT
	cp requirements.lock "$$new"
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate --no-header \
	    --output-file "$$new" pyproject.toml
	{ grep '^#' requirements.lock; grep -Ev '^(nvidia-[^m]|cuda-|triton==)' "$$new"; } >requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ## Remove caches, builds and synthetic checkpoints; runs and .venv stay
	@found=$$(ls -d build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis artifact/checkpoints 2>/dev/null || true)
	found="$$found $$(find . -path ./.venv -prune -o -path ./artifact/runs -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print)"
	for path in $$found; do echo "removing $$path ($$(du -sh "$$path" | cut -f1))"; rm -rf "$$path"; done
	echo "Kept: artifact/runs and .venv"
