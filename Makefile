# make demo    trains two real architectures, plain and with graphfuse (build/demo.png)
# make test    everything that needs no GPU
# make zoo     every causal language model type of transformers, eager against graphfuse (docs/coverage.md)
# make docs    docs/patterns.md, from the catalogue
# make lint    ruff and mypy
#
# On a machine whose python already has a CUDA torch >= 2.11, use that one instead of installing another:
#   make demo PYTHON=python3 VENV_FLAGS=--system-site-packages

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
# Used only where the environment has no torch yet. An open range can pull gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
JOBS ?= auto
# OpenMP threads that spin while they wait crawl on a machine that others use too.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin

.PHONY: demo test zoo docs lint venv clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS) --maxprocesses 8

zoo: $(VENV)/.dev
	$(BIN)/python -m tests.zoo

docs: $(VENV)/.dev
	$(BIN)/python -m tests.docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

# The stamp's name is the extra's.
$(VENV)/.demo $(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[$(@F:.%=%)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
