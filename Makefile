# `make quickstart` and `make test` do all set-up on a machine that has python3 (3.11 or newer) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup quickstart drills test test-slow test-gpu check format clean

help:
	@echo "make quickstart   train, grow, compare, report: a few minutes on two CPU cores"
	@echo "make test         checks, then the tests, on up to 8 cores (some 5 minutes on two)"
	@echo "make drills       runs that are killed, damaged, hung: nothing may be lost; some minutes"
	@echo "make check        formatting, lint, types, import rules"
	@echo "make format       format and fix what can be fixed"
	@echo "make test-slow    the tests marked slow; make test-gpu: those that need a CUDA device"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)

quickstart: $(READY)
	$(BIN)/tokenformer quickstart

drills: $(READY)
	$(BIN)/python -m drills

# a file's tests stay together: some share what is slow to begin
test: check
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
