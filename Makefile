# `make` alone lists the targets. Each sets up what it needs on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PAPER ?= graphmae regularized_ae
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo reproduce test lint format bench gpu-check parity tables report new-project clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	@touch $(READY)

setup: $(READY)  ## virtual environment .venv with everything

demo: $(READY)  ## train and evaluate on embedded defaults, write report/index.html   [PAPER=name|all]
	$(BIN)/python -m projects demo $(PAPER)

reproduce: $(READY)  ## obtain reported rows   PAPER=name [ROW=row] [DATA=folder]
	$(BIN)/python -m projects reproduce $(PAPER) $(if $(ROW),--row '$(ROW)') $(if $(DATA),--data '$(DATA)')

test: $(READY)  ## all tests   [ARGS=...]
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## ruff, mypy on common, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(READY)  ## worst relative error of every parity case   [GOLDENS=folder[:folder...]]
	$(if $(GOLDENS),CONTRAMASK_GOLDENS='$(GOLDENS)') $(BIN)/python -m tests.parity

bench: $(READY)  ## benchmarks on whatever this machine has
	$(BIN)/python -m benchmarks

gpu-check: $(if $(GPU_PYTHON),,$(READY))  ## kernel tests and kernel benchmark on a GPU, under 8 minutes   [GPU_PYTHON=python3 that has torch]
	TRITON_INTERPRET=0 timeout 240 $(or $(GPU_PYTHON),$(BIN)/python) -m pytest tests/kernels
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.kernels --rounds 20 --budget 180

tables: $(READY)  ## render the tables of all READMEs from the records
	$(BIN)/python -m projects tables
	$(BIN)/python -m benchmarks.readme

report: $(READY)  ## write report/index.html
	$(BIN)/python -m projects report

new-project: $(READY)  ## begin a project from the skeleton   NAME=name
	$(BIN)/python -m projects new $(NAME)

clean:  ## remove runs, report and caches (not .venv)
	rm -rf runs report .pytest_cache .mypy_cache .ruff_cache
