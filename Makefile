# One command each, from a fresh clone: `make demo`, `make test`. See `make help`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# Test workers; each gets one thread, since small models gain nothing from more.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test zoo bench clean

help:
	@echo "make demo   install, then run task vectors and hyperfeatures on the small models that ship (minutes)"
	@echo "make test   lint, format check, types, tests"
	@echo "make zoo    train the models that ship from nothing (up to 2 hours on 2 cores)"
	@echo "make bench  time captures, patching, features and guidance beside nnsight, TransformerLens, pyvene, plain autograd"
	@echo "make clean  remove the virtual environment and caches (results in runs/ stay)"
	@echo "PYTHON=...  which Python (3.11 or newer) makes the virtual environment; now: $(PYTHON)"

demo: $(VENV)/.installed
	$(BIN)/interp run task-vector-transfer
	$(BIN)/interp run hyperfeature-correspondence --folds 1 --train-pairs 12 --test-pairs 12 --seeds 1 --steps 200

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

zoo: $(VENV)/.installed
	$(BIN)/python -m interp.zoo.train
	$(BIN)/python -m interp.zoo.diffusion.train
	$(BIN)/python -m interp.zoo.readouts.train

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/capture_overhead.py
	$(BIN)/python benchmarks/hyperfeatures.py
	$(BIN)/python benchmarks/guidance.py
	@# Of what it depends on, only what draws plots in notebooks is left out.
	@$(PIP_INSTALL) --no-deps pyvene==0.1.8
	$(BIN)/python benchmarks/patching.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find interp experiments tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "No '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1); interp needs Python 3.11 or newer. Name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing interp into $(VENV) (once; PyTorch is the large part) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.installed
	@echo "Installing what 'make $(MAKECMDGOALS)' needs ..."
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@
