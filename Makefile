# `make help` lists the targets. Everything is installed into .venv, nothing elsewhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# setuptools explains editable installs at length every time; the other warnings stay.
PIP := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip --disable-pip-version-check

DEMO_OPTIMIZERS ?= kfac-autoencoder,sgd,adam
DEMO_SECONDS ?= 30
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
CUPY_TESTS ?= @tests/cuda_on_cpu/selection.txt
# Test processes: one a core, but not more than 4.
PYTEST_JOBS ?= auto

.DELETE_ON_ERROR:
.PHONY: help demo test test-all coverage test-cupy lint lint-rules lint-format lint-types lint-spelling format docs clean
.PHONY: bench bench-cuda bench-history

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "Variables: PYTHON=$(PYTHON) DEMO_SECONDS=$(DEMO_SECONDS) DEMO_OPTIMIZERS=$(DEMO_OPTIMIZERS) DEMO_FLAGS= PYTEST_FLAGS= PYTEST_JOBS=$(PYTEST_JOBS)"

demo: $(VENV)/demo.stamp ## train the CURVES autoencoder with K-FAC, SGD and Adam; writes runs/demo
	$(BIN)/kfac-np compare --data curves --model autoencoder --optimizers $(DEMO_OPTIMIZERS) \
	    --seconds $(DEMO_SECONDS) --out runs/demo $(DEMO_FLAGS)

# Each test process gets one BLAS thread: the matrices are small and the processes many.
test test-all coverage: export OPENBLAS_NUM_THREADS ?= 1
test test-all coverage: export OMP_NUM_THREADS ?= 1
test test-all coverage: export MKL_NUM_THREADS ?= 1
# Many tests start programs: the library is compiled once for all of them.
test test-all coverage: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/test.stamp ## tests and doctests: all cases on NumPy, each of them on the other backends
	$(BIN)/python -m pytest --numprocesses $(PYTEST_JOBS) --maxprocesses 4 $(PYTEST_FLAGS)

test-all: ## the same with every law on every case on every backend
	$(MAKE) test PYTEST_FLAGS='--all $(PYTEST_FLAGS)'

coverage: ## the same as test, with branch coverage: takes two or three times as long
	$(MAKE) test PYTEST_FLAGS='--cov $(PYTEST_FLAGS)'

# The real CuPy on a machine without a GPU: tests/cuda_on_cpu/README.md. Kernels are compiled once.
test-cupy: export CUDA_ON_CPU_HOME ?= $(CURDIR)/$(VENV)/cuda-on-cpu
test-cupy: export OPENBLAS_NUM_THREADS ?= 1
test-cupy: ## a selection of the tests on the real CuPy, on the CPU; CUPY_TESTS=tests/layers: others
	PYTHON=$(PYTHON) tests/cuda_on_cpu/run -m pytest -k cupy -p no:cacheprovider -q \
	    --numprocesses $(PYTEST_JOBS) --maxprocesses 4 $(CUPY_TESTS) $(PYTEST_FLAGS)

# `make -k lint` goes on to the next tool after one has found something.
lint: lint-rules lint-format lint-types lint-spelling ## ruff (rules, docstrings, format), mypy --strict, spelling

lint-rules: $(VENV)/lint.stamp
	$(BIN)/ruff check .

lint-format: $(VENV)/lint.stamp
	$(BIN)/ruff format --check .

lint-types: $(VENV)/lint.stamp
	$(BIN)/mypy

lint-spelling: $(VENV)/lint.stamp
	$(BIN)/codespell

format: $(VENV)/lint.stamp ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# BENCH names workloads (all: .venv/bin/python benchmarks/bench.py --help).
bench: $(VENV)/$(if $(filter tables code,$(BENCH)),bench,peers).stamp ## step times beside kfac-jax's and PyTorch's: make bench BENCH=W1-4000-fixed
	$(BIN)/python benchmarks/bench.py $(BENCH) $(BENCH_FLAGS)

# On a CUDA machine, with CuPy (pip install -e '.[cuda12x]') and CUDA builds of JAX and PyTorch.
bench-cuda: $(VENV)/peers.stamp
	$(BIN)/python benchmarks/bench.py --backend cupy $(BENCH) $(BENCH_FLAGS)
	$(BIN)/python benchmarks/bench.py --backend cupy --tf32 $(BENCH) $(BENCH_FLAGS)

# This library alone, against its own earlier runs on this machine.
bench-history: $(VENV)/bench.stamp
	$(BIN)/python -m pytest -W default benchmarks/history --benchmark-autosave --benchmark-compare \
	    --benchmark-storage=file://runs/bench-history $(PYTEST_FLAGS)

# A page for every package, and for modules whose names no package passes on.
PAGES = $(patsubst %/,%,$(dir $(wildcard kfac_np/__init__.py kfac_np/*/__init__.py \
    kfac_np/*/*/__init__.py))) $(basename $(wildcard kfac_np/[a-z]*.py)) kfac_np/training/checkpoint

docs: $(VENV)/docs.stamp ## reference pages from the docstrings, in build/docs
	$(BIN)/pdoc --docformat numpy --math --output-directory build/docs $(sort $(subst /,.,$(PAGES)))

clean: ## remove what the other targets made, except runs/
	rm -rf $(VENV) build dist kfac_np.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that what its target needs is installed, so that a second call is quick.
$(VENV)/demo.stamp: REQUIREMENTS = -e '.[cli]'
$(VENV)/test.stamp: REQUIREMENTS = -e '.[cli]' --group test
$(VENV)/lint.stamp: REQUIREMENTS = -e '.[cli]' --group lint
$(VENV)/docs.stamp: REQUIREMENTS = -e '.[cli]' --group docs
$(VENV)/bench.stamp: REQUIREMENTS = -e . --group bench

$(VENV)/%.stamp: $(VENV)/pip.stamp setup.cfg pyproject.toml
	$(PIP) install --quiet $(REQUIREMENTS)
	@touch $@

# Without peers, bench measures this library and says what is missing.
$(VENV)/peers.stamp: $(VENV)/bench.stamp
	$(PIP) install --quiet --group bench-peers || echo "bench: some peers could not be installed" >&2
	@touch $@

# Dependency groups need pip 25.1.
$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "kfac_np needs Python 3.11 or newer; '$(PYTHON)' is not (say make PYTHON=python3.12 ...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@
