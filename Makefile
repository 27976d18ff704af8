# make demo, make test: each sets up what it needs. The rest is for work on interp itself (CONTRIBUTING.md).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
JOBS ?= 2
SEEDS ?= 3
STEPS ?= 800
INSTALLED := .venv/.installed
CONSTRAINTS = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU || echo -c constraints.txt)
CHROMIUM := chromium chromium-browser google-chrome google-chrome-stable

.DEFAULT_GOAL := help
.PHONY: help demo test fast lint types format hooks bench tables docs notebooks models browser

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## fetch two small models and show what interp does with them
	$(BIN)/interp fetch smollm2-135m efficientnet-lite0
	$(BIN)/interp demo

test: lint types models browser ## all checks and all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

fast: $(INSTALLED) ## tests that take seconds
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not browser"

docs: $(INSTALLED) ## pages and reference as HTML in docs/_build
	$(BIN)/python -m sphinx -W --keep-going -q -j $(JOBS) -b html docs docs/_build

notebooks: $(INSTALLED) ## tutorials as notebooks in tutorials/notebooks
	$(BIN)/python -m tests.notebooks tutorials/notebooks

bench: $(INSTALLED) ## benchmarks (tests/benchmarks/bench_*.py)
	$(BIN)/python -m pytest tests/benchmarks -o python_files="bench_*.py" -s

tables: $(INSTALLED) ## tables of docs/causal_abstraction.md (long; goes on where it was stopped)
	$(BIN)/python -m tests.tables.causal --seeds $(SEEDS) --steps $(STEPS)
	$(BIN)/python -m tests.tables.indirect

lint: $(INSTALLED) ## style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## types
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(INSTALLED) ## put the code in form
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

hooks: $(INSTALLED) ## run the checks at each commit and push
	$(BIN)/prek install

# One thread: with more busy processes than cores, torch's default number of threads is many times slower.
test fast tables: export OMP_NUM_THREADS = 1

# Remade when the list of dependencies changes, not for each run.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "interp needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[all,dev]"
	@touch $@

models: $(INSTALLED)
	$(BIN)/interp fetch smollm2-135m efficientnet-lite0 minilm-l6
	$(BIN)/interp fetch esrgan-slim-x2 || \
	{ ! command -v npm >/dev/null && echo "No npm: tests of esrgan-slim-x2 are skipped."; }

browser:
	@for name in $(CHROMIUM); do command -v $$name >/dev/null && exit 0; done; \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update && apt-get install -y chromium && exit 0; \
	echo "No Chromium: browser tests are skipped. Install it by your system's packages (Debian: chromium)."
