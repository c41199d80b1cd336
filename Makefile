# Every target does all of its own set-up: it makes a virtual environment in .venv, installs the package with the
# versions of constraints.txt, and runs. All that a machine needs is Python >= 3.11 with its venv module, and make.
#
#     make PYTHON=python3.13 test      another interpreter
#     make PYTEST_ARGS="-k pooling" test
#     make BENCH_ARGS="--quick" bench
#     make FUZZ_COUNT=500 FUZZ_PROCESSES=4 fuzz

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_COUNT ?= 10000
FUZZ_PROCESSES ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# The demonstration was timed on two cores; more threads than cores make small tensors slower, not faster.
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What each target installs. The tests run the demonstration's code too; the type checker reads everything.
EXTRAS_demo := demo
EXTRAS_test := demo,test
EXTRAS_lint := demo,test,lint,browser
EXTRAS_browser := browser
EXTRAS_dask := test,dask
EXTRAS_bench := bench
EXTRAS_peers := bench,peers

.PHONY: demo test slow test-dask test-browser lint format bench peers fuzz clean distclean help

demo: $(VENV)/installed-demo  ## the main job: explain, compare, and train on scikit-learn's digits
	$(BIN)/implicitdiff demo

test: $(VENV)/installed-test  ## all tests, one process for each core
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 \
	    --dist worksteal $(PYTEST_ARGS)

slow: $(VENV)/installed-test  ## the orderings of the discrete experiments, by training: minutes
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 \
	    tests/slow/identity_orderings.py

test-dask: $(VENV)/installed-dask  ## a user's solver on a local Dask cluster, which this installs
	$(BIN)/python -m pytest tests/distributed/solver_on_dask.py

test-browser: $(VENV)/installed-browser  ## the HTML report in a headless browser, which this installs
	bash tests/browser/install.sh $(BIN)/python
	$(BIN)/python -m pytest tests/browser/report_in_browser.py

lint: $(VENV)/installed-lint  ## ruff (rules and format), mypy, import-linter
	@status=0; \
	for check in "ruff check ." "ruff format --check ." mypy lint-imports; do \
	    echo "== $$check"; $(BIN)/$$check || status=1; \
	done; \
	exit $$status  # all four run, so that one call shows everything

format: $(VENV)/installed-lint  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/installed-bench  ## benchmarks: tables and plots in out/bench/ (BENCH_ARGS="--quick": small sizes)
	PYTHONPATH=docs OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH_ARGS)

# qpth's metadata forbids the NumPy that it runs with; its other dependencies come with cvxpylayers.
peers: $(VENV)/installed-peers  ## install the other libraries that `make bench` compares with
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps qpth

fuzz: $(VENV)/installed-test  ## 10,000 random programs against the dense formula (FUZZ_COUNT, FUZZ_PROCESSES)
	$(BIN)/python -m tests.fuzz.campaign --count $(FUZZ_COUNT) --processes $(FUZZ_PROCESSES)

clean:  ## remove caches and build outputs
	rm -rf build dist out *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environment
	rm -rf $(VENV)

help:  ## this list
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/' | expand -t 20

# The stamp is written last: an interrupted installation is done again.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing implicitdiff[$(EXTRAS_$*)] into $(VENV) ..."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS_$*)]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "implicitdiff needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); try make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
