# A newcomer needs make and Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help install demo test check lint types docs format clean

help: ## say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(READY) ## make .venv with the package and everything that the tests need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old; Graftwork needs Python 3.11 or newer. Name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	@touch $(READY)

demo: $(READY) ## run the whole line on the offline world and write demo/report.html
	$(BIN)/graftwork demo --output demo
	@echo "Open demo/report.html"

# one process per core, one thread each: the tests' tensors are too small to share
test: $(READY) ## run the test suite
	$(BIN)/python -m pytest --numprocesses auto

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
