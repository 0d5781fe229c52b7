# Requires make and Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# stamps: runtime dependencies are installed; test dependencies are installed
USABLE := $(VENV)/.usable
READY  := $(VENV)/.ready
# bytecode is compiled at first import; most modules are never imported
PIP    := $(BIN)/python -m pip install --quiet --no-compile
# without cached bytecode every process compiles all of transformers: 22 s instead of 10 s to start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test test-long test-newest faults fuzz coverage mutation check lint types docs measured tables format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(READY) ## create .venv with the package and the test dependencies

$(USABLE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old; Graftwork needs Python 3.11 or newer. Choose another interpreter: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) --constraint constraints.txt --editable '.[all]'
	@touch $(USABLE)

$(READY): $(USABLE)
	$(PIP) --constraint constraints.txt --editable '.[all]' --group dev
	@touch $(READY)

demo: $(USABLE) ## run all methods on the offline world and write demo/report.html
	$(BIN)/graftwork demo --output demo
	@echo "Open demo/report.html"

# one process per core with one thread each: the tensors of the tests are too small for several threads
test: $(READY) ## run the test suite
	$(BIN)/python -m pytest --numprocesses auto -m "not long"

test-long: $(READY) ## run the tests that train for a minute or more
	$(BIN)/python -m pytest --numprocesses auto -m long

NEWEST := .venv-newest

# newest versions that the lower bounds allow, except torch; constraints.txt is not read
test-newest: ## run the test suite with the newest dependencies, in an environment of its own
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --no-compile --upgrade 'pip>=25.1'
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --no-compile --constraint $(NEWEST)/torch.txt --editable '.[all]' --group dev
	$(NEWEST)/bin/python -m pip list --format freeze | tr _ - | sort -f > $(NEWEST)/found.txt; grep == constraints.txt | tr _ - | sort -f | diff - $(NEWEST)/found.txt | grep '^[<>]' || true
	$(NEWEST)/bin/python -m pytest --numprocesses auto -m "not long"

# also one of the long tests
faults: $(READY) ## kill every writer at every commit point and at random moments
	$(BIN)/python tests/faults/run.py

fuzz: $(READY) ## read 100,000 mutated files with every reader; part of test-long
	$(BIN)/python tests/fuzz_readers.py

coverage: $(READY) ## compare every method with the dense model on every model type; rewrite the table of model types
	$(BIN)/python tests/sweep_types.py
	$(BIN)/python docs/generate.py

mutation: $(READY) ## test a sample of mutants of the source; takes about 30 minutes
	$(BIN)/python tests/mutation/run.py

check: lint types docs ## lint, check types, build the documentation

lint: $(READY) ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY) ## fix style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

measured: $(READY) ## repeat the benchmarks of ratios with one and two threads, and add them to the tables
	$(BIN)/python benchmarks/measured.py
	$(BIN)/python docs/generate.py

tables: $(READY) ## rewrite the generated tables of the README and the cards
	$(BIN)/python docs/generate.py

clean: ## remove generated files
	rm -rf $(VENV) $(NEWEST) dist demo site .pytest_cache .ruff_cache
