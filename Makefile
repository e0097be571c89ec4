# These commands do everything on a machine with Python and make:
#   make quickstart   both methods on an embedded default: five to ten minutes on two cores, half of them for a seed model
#                     that is kept
#   make test         ruff, mypy and the tests that are quick: fifteen to twenty minutes on two cores
#   make test-all     every test: kills, pods, TPU compilations, rounds and benches besides, the better part of an hour
#   make coverage     every test with coverage, a line for each file that is not whole; TESTS=tests/unit for some of them
#   make test-real    the tests on real checkpoints: every model directory in the folder LM_JAX_REAL_MODELS
#   make faults       breaks real runs on purpose and counts what held
# Choose the interpreter with PYTHON=python3.12. Both share .venv and install only when pyproject.toml changed.

PYTHON ?= python3
TESTS ?= tests
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all test-real lint coverage faults
.NOTPARALLEL:  # two installations into one environment would break each other

# The environment holds no accelerator's JAX, and with the tests' libtpu in it JAX would look for a TPU first
quickstart: export JAX_PLATFORMS ?= cpu
quickstart: $(VENV)/.installed
	$(BIN)/python -m launch.quickstart

# A process for each of two cores; what shares a fixture stays together
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint
	$(PYTEST) -m 'not slow and not real'

test-all: lint
	$(PYTEST) -m 'not real'

# One process: two models beside each other need more memory than many a machine has
test-real: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m real -rs tests/real

# Runs that are killed, stopped, starved and damaged, in the ways that tests/faults lists: each as often as it says there
# (ten seeds where two processes are involved: hours), or TIMES=3 of each
faults: $(VENV)/.installed-test
	$(BIN)/python -m tests.faults $(TIMES:%=--times=%)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# Of commands that tests start as processes of their own only what happens before they are killed or forked is counted
coverage: $(VENV)/.installed-test
	$(PYTEST) --cov --cov-report=term $(TESTS)

# One recipe makes the environment and fills it, so that a half-made one is made again
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# All in one resolve: torch's pin decides with the rest. It contains what quickstart needs, hence both stamps
$(VENV)/.installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(VENV)/.installed $@
