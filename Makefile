# `make demo` and `make test` are all a fresh machine needs: each sets up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One torch-extensions folder per checkout: a lock left by a killed build elsewhere cannot hang us.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
export MLFLOW_DISABLE_TELEMETRY ?= true
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo test test-slow faults check fix learn constraints clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "jepa needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,prep,dev]'
	touch $@

# Two files of tests at a time: with three, tests on timing of real jobs failed. A file stays whole,
# since its tests share the runs they look at.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup check
	$(PYTEST) -m 'not slow and not gpu'

test-slow: setup
	$(PYTEST) -m 'slow and not gpu'

# The long run of faults: half an hour at most; FAULTS="--faults 8 --mutants 500" for less.
faults: setup
	$(BIN)/python -m tests.faults $(FAULTS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

fix: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup
	$(BIN)/python -m benchmarks.demo

learn: setup
	$(BIN)/python -m benchmarks.learn

# Pins the versions that are installed now.
constraints:
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

# Caches and what the demo and the benchmarks made; never your runs or data.
clean:
	rm -rf runs/demo runs/demo-data runs/demo-seed-* runs/learn runs/learn-data .pytest_cache .ruff_cache
