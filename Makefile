# One .venv for everything, made anew whenever constraints.txt or pyproject.toml change. `make demo` installs what a user
# needs; every other target adds the tools of development to it.
PYTHON ?= python3
BIN := .venv/bin
DEMO := .venv/.user
STAMP := .venv/.development
# Bytecode is written when a module is first imported, not by pip: installing takes less than half the time.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test check docs tutorial hooks chaos soak fuzz browsertools browser size clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(DEMO): constraints.txt pyproject.toml
	@rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[report]'
	@touch $(DEMO)

$(STAMP): $(DEMO)
	$(PIP) --editable '.[dev,s3]'
	@touch $(STAMP)

demo: $(DEMO) ## poison, train, purify and evaluate on synthetic data; a table and one picture
	$(BIN)/eclipse-ray demo --out runs/demo

# Two files run at a time, because tests with Ray mostly wait; one thread each, so that two processes share two cores.
# At the end: the twenty slowest tests, and every skipped test with its reason.
test: $(STAMP) ## every test except the long fault tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 -rs

check: $(STAMP) ## style, types and the import walls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP) ## the documentation as a site in build/site; every warning, such as a dead link, is an error
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

tutorial: $(STAMP) ## run the tutorial notebook from its first cell to its last
	$(BIN)/python -m pytest -m chaos tests/test_tutorial.py

hooks: $(STAMP) ## the fast half of make check before every commit (needs git)
	$(PIP) pre-commit
	$(BIN)/pre-commit install

chaos: $(STAMP) ## every fault test: real processes are killed, real servers break; an hour or more
	ECLIPSE_RAY_EXAMPLES=500 $(BIN)/python -m pytest -m 'chaos or ledger'

soak: $(STAMP) ## 200,000 images in 1,000 shards: memory of the driver, listings, share of the ledger in the time
	$(BIN)/python benchmarks/ledger.py --out runs/ledger

fuzz: $(STAMP) ## five minutes of damaged images, tars and tables
	$(BIN)/python -m tests.fuzz.fuzz_decode --seconds 300

browsertools: $(STAMP) ## what the browser tests need besides Chromium: playwright from PyPI, axe-core from npm
	$(PIP) --editable '.[browser]'
	npm install --silent --no-save --prefix .venv axe-core@4.14.1

browser: browsertools ## reports in the system's Chromium: layout, keyboard, accessibility
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/reports/test_browser.py

size: $(STAMP) ## modules, lines, settings and public names of the package, and lines of tests
	PYTHONPATH=. $(BIN)/python tools/size.py

clean: ## remove the virtual environment and all runs
	rm -rf .venv runs
