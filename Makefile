# Everything CI runs is what you type here.  `make` alone says what there is.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    ?= runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help install demo lint types unit test slow clean

help:  ## Show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> Installing robustbench-ext and its dependencies (torch is large: minutes on a first install)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade torch torchvision
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@echo "==> Installing torchattacks without its outdated pin on requests"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchattacks
	@touch $@

install: $(STAMP)  ## Create .venv and install everything into it
	@echo "==> $(VENV) is up to date"

demo: $(STAMP)  ## Run the quickstart suite and say where the report is
	@echo "==> Running the quickstart suite into $(RUN) (a few minutes on two CPU cores; a second run reuses it all)"
	@$(BIN)/rbx run quickstart --out $(RUN)
	@echo "==> The report: $(abspath $(RUN)/report.html)"

lint: $(STAMP)  ## ruff
	@echo "==> ruff"
	@$(BIN)/ruff check .

types: $(STAMP)  ## mypy --strict on the five packages
	@echo "==> mypy"
	@$(BIN)/mypy

unit: $(STAMP)  ## Unit and integration tests, without the slow ones
	@echo "==> pytest (without slow tests), one worker a core"
	@$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test: lint types unit  ## What CI runs: lint, types, tests

slow: $(STAMP)  ## The slow tests
	@$(BIN)/python -m pytest -m slow

clean:  ## Remove the environment and what the tools cached
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
