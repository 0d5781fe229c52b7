# A newcomer needs make and Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# what the demonstration needs, and with it what the tests need
USABLE := $(VENV)/.usable
READY  := $(VENV)/.ready
# modules are compiled when they are first imported, which few of them ever are
PIP    := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: help install demo test test-long check lint types docs format clean

help: ## say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(READY) ## make .venv with the package and everything that the tests need

$(USABLE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old; Graftwork needs Python 3.11 or newer. Name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) --constraint constraints.txt --editable '.[all]'
	@touch $(USABLE)

$(READY): $(USABLE)
	$(PIP) --constraint constraints.txt --editable '.[all]' --group dev
	@touch $(READY)

demo: $(USABLE) ## run the whole line on the offline world and write demo/report.html
	$(BIN)/graftwork demo --output demo
	@echo "Open demo/report.html"

# one process per core, one thread each: the tests' tensors are too small to share
test: $(READY) ## run the test suite
	$(BIN)/python -m pytest --numprocesses auto -m "not long"

test-long: $(READY) ## run the few tests that train for a minute or more
	$(BIN)/python -m pytest --numprocesses auto -m long

check: lint types docs ## lint, check types, build the documentation

lint: $(READY) ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY) ## put style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what was made
	rm -rf $(VENV) dist demo site .pytest_cache .ruff_cache
