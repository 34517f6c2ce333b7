# Every target installs what it needs into .venv first. Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed
DOCS := $(VENV)/.installed-docs
PROJECTS := pyproject.toml $(wildcard packages/*/pyproject.toml)
SYNC := VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv sync --active --quiet --all-packages --all-extras
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint house format docs bench compare faults clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "make %-9s %s\n", $$1, $$2}'

demo: $(BASE) ## pre-train on real images, evaluate, write runs/demo/report.html (minutes)
	$(BIN)/python tools/demo.py

test: $(BASE) ## every test but the slow ones
	$(PYTEST) -m "not slow"

test-all: $(BASE) ## every test, wheels in empty environments and long kills included
	$(PYTEST)

faults: $(BASE) ## only the tests that kill, corrupt and fill up
	$(PYTEST) tests/faults

lint: $(BASE) house ## ruff, mypy and the rules of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

house: $(BASE) ## files and lines per folder; imports, repeated code and long files that break the rules
	$(BIN)/python tools/house.py

format: $(BASE) ## let ruff put the code in shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DOCS) ## build site/; a dead link, a missing page or a docstring of no parameter fails
	$(BIN)/python tools/build_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet, warnings would not count

bench: $(BASE) ## the methods compared: quality, three seeds (long); options: make bench ARGS="--data fmnist"
	$(BIN)/python tools/benchmark.py $(ARGS)

compare: $(BASE) ## speed beside transformers and beside plain loops
	set -e; for tool in tools/compare_*.py; do $(BIN)/python $$tool $(ARGS); done

clean: ## remove caches and built files; leaves runs/ and .venv alone
	rm -rf build dist site docs/methods docs/reference .mypy_cache .pytest_cache .ruff_cache packages/*/dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not there"); \
	  echo "unmask needs Python 3.11 to 3.13; $(PYTHON) is $$found. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

$(BASE): $(PROJECTS) | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(SYNC)
	@touch $@

$(DOCS): $(BASE)
	@$(SYNC) --group docs
	@touch $@
