# Every target sets up what it needs: a virtual environment in .venv, filled from constraints.txt.
# Where packages come from is pip's own configuration (pip.conf, PIP_* variables).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs format bench reproduce study clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv and install everything (the other targets do this too)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "rrhf-peft needs Python 3.10 or newer, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); the first time takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and alone, so that nothing else decides which build of it is installed
	@$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## Train, compare and merge a small model, from nothing, in a few minutes
	@$(BIN)/rrhf-peft demo --output runs/demo

test: $(READY) ## Run the fast tests, README commands and notebooks included
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(READY) ## Lint, format, types and import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(READY) ## Build the documentation strictly into docs/_build/html (DOCS_NOTEBOOKS=off: do not run notebooks)
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	  then $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html; \
	  else echo "Its generator needs Python 3.11 or newer: the documentation was not built."; fi

format: $(READY) ## Apply the formatter and the safe lint fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## Measure the engine against the plain step: queries/s, roofline, padding, memory
	@$(BIN)/python tests/bench/step_bench.py --csv bench.csv --plot bench.png
	@$(BIN)/python tests/bench/step_bench.py --chunks 2 8 64

reproduce: $(READY) ## Run the RRHF paper's tables at small scale: MODEL= STORIES= SEEDS="0 1 2 3 4" BRIEF=1
	@$(BIN)/python recipes/paper/reproduce.py $(if $(MODEL),--model '$(MODEL)') $(if $(STORIES),--stories '$(STORIES)') \
	  $(if $(SEEDS),--seeds $(SEEDS)) $(if $(BRIEF),--brief)

study: $(READY) ## Compare all losses at matched KL: SENTIMENT= MODEL= STORIES= MINUTES= BRIEF=1
	@$(BIN)/python recipes/study/study.py --sentiment '$(SENTIMENT)' $(if $(MODEL),--model '$(MODEL)') \
	  $(if $(STORIES),--stories '$(STORIES)') $(if $(MINUTES),--minutes '$(MINUTES)') $(if $(BRIEF),--brief)

clean: ## Remove the virtual environment and the caches, not the runs
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info
