# One .venv for everything: made from nothing, made anew whenever constraints.txt or pyproject.toml change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test check docs tutorial hooks chaos soak fuzz browser clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): constraints.txt pyproject.toml
	@rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,s3]'
	@touch $(STAMP)

demo: $(STAMP) ## poison, train, purify and evaluate on synthetic data; a table and one picture
	$(BIN)/eclipse-ray demo --out runs/demo

# Two files at a time, for much of a Ray test is waiting; threads of two processes would fight over two cores.
test: $(STAMP) ## every test but the long fault tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## style, types and the walls between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP) ## the documentation as a site in build/site; a warning, such as a dead link, is an error
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

tutorial: $(STAMP) ## run the tutorial notebook from its first cell to its last
	$(BIN)/python -m pytest -m chaos tests/test_tutorial.py

hooks: $(STAMP) ## the fast half of make check before every commit (needs git)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt pre-commit
	$(BIN)/pre-commit install

chaos: $(STAMP) ## every fault test: real processes are killed, real servers break; an hour or more
	ECLIPSE_RAY_EXAMPLES=500 $(BIN)/python -m pytest -m 'chaos or ledger'

soak: $(STAMP) ## 200,000 images in 1,000 shards: the driver's memory, listings, and the ledger's share of the time
	$(BIN)/python benchmarks/ledger.py --out runs/ledger

fuzz: $(STAMP) ## five minutes of damaged images, tars and tables
	$(BIN)/python -m tests.fuzz.fuzz_decode --seconds 300

browser: $(STAMP) ## reports in the system's Chromium, with axe-core from npm: layout, keyboard, accessibility
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	npm install --silent --no-save --prefix .venv axe-core@4.14.1
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reports/test_browser.py

clean: ## remove the virtual environment and all runs
	rm -rf .venv runs
