# Everything CI runs is what you type here.  `make` alone says what there is.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    ?= runs/quickstart
EXTRAS ?= dev
# Environments of their own, so that neither disturbs the other.
OLDEST := .venv-minimum
AUDIT  := .venv-audit
PIP    := python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo lint types unit test slow minimum audit docs wheel clean

help:  ## Show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> Installing robustbench-ext and its dependencies (torch is large: minutes on a first install)"
	@$(BIN)/$(PIP) --upgrade torch torchvision
	@$(BIN)/$(PIP) --editable '.[$(EXTRAS)]'
	@echo "==> Installing torchattacks without its outdated pin on requests"
	@$(BIN)/$(PIP) --no-deps torchattacks
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

slow: $(STAMP)  ## The slow tests, with every integration there is
	@echo "==> Installing all integrations into $(VENV)"
	@$(BIN)/$(PIP) --editable '.[dev,docs,integrations]'
	@echo "==> pytest (slow tests)"
	@$(BIN)/python -m pytest -m slow

minimum:  ## Tests with the oldest versions that pyproject.toml allows (Python 3.10 or 3.11)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' || \
		{ echo "These versions are for Python 3.10 and 3.11; try: make PYTHON=python3.10 minimum"; exit 1; }
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "==> Installing the oldest versions into $(OLDEST)"
	@$(OLDEST)/bin/$(PIP) --constraint constraints/minimum.txt --editable '.[test,train,uq]'
	@echo "==> pytest (without slow tests)"
	@$(OLDEST)/bin/python -m pytest -m "not slow" -n auto --dist loadfile

audit:  ## Known vulnerabilities of what a user installs (asks the package index for its advisories)
	@test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/$(PIP) --upgrade pip pip-audit
	@echo "==> Resolving the default dependencies, without installing them"
	@$(AUDIT)/bin/$(PIP) --dry-run --ignore-installed --report $(AUDIT)/resolved.json .
	@$(AUDIT)/bin/python -c 'import json, sys; \
		found = [i["metadata"] for i in json.load(open("$(AUDIT)/resolved.json"))["install"]]; \
		print(*(m["name"] + "==" + m["version"] for m in found if m["name"] != "robustbench-ext"), sep="\n")' \
		> $(AUDIT)/resolved.txt
	@echo "==> pip-audit of $$(grep -c . $(AUDIT)/resolved.txt) packages"
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(AUDIT)/resolved.txt

docs: $(STAMP)  ## Build the documentation into site/
	@$(BIN)/$(PIP) --editable '.[docs]'
	@$(BIN)/mkdocs build --strict

wheel: $(STAMP)  ## Build wheel and sdist into dist/
	@$(BIN)/$(PIP) build
	@$(BIN)/python -m build

clean:  ## Remove the environment and what the tools cached
	rm -rf $(VENV) $(OLDEST) $(AUDIT) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
