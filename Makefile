# `make help` says what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv run test bench clean

help:
	@echo "make run     a whole life of a model in a few minutes; ARGS='--minutes 3' goes to 'athanor run'"
	@echo "make test    formatting, lint, types, import contract and fast tests"
	@echo "make bench   the benchmarks in bench/"
	@echo "make venv    the environment in $(VENV); PYTHON=python3.12 chooses the Python, TORCH=torch==2.12.1 the torch"
	@echo "make clean   remove $(VENV) and caches (runs/ stays)"

# The stamps are newer than pyproject.toml when what it asks for is installed.
venv: $(VENV)/installed

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Athanor needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# Alone and first: where pip has a build of torch for this machine (without CUDA, say), it is taken.
$(VENV)/torch: $(VENV)/made
	$(PIP) install "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) install --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --editable '.[dev]'
	touch $@

run: venv
	$(BIN)/athanor run $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

bench: $(VENV)/installed-dev
	@for script in bench/*.py; do [ -e "$$script" ] || continue; echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
