# Every target but help and clean makes .venv first and installs the pinned versions into it.
# One stamp for each set of extras: it is renewed when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# The lowest versions that pyproject.toml states, and what old matplotlib calls of newer pyparsing.
OLDEST := .venv-oldest
OLD_WARNINGS := -W ignore::pyparsing.warnings.PyparsingDeprecationWarning
# The tools of the benchmarks live apart: some need another numpy, some packages that break torch.
TORCH_PEERS := .venv-torch-peers
NEURAL_TANGENTS := .venv-neural-tangents
BENCHMARK_OPTIONS ?=
GPU_CHECK_OPTIONS ?=
STUDY_OPTIONS ?=

# pip reads the first for ordinary installs, newer versions the second for the isolated build.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One thread for each worker: more threads than cores make small matrix products slower.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Threads that wait without spinning: there may be more of them than cores.
TWO_THREADS := OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# What rounds otherwise on another processor: sums run in another order.
NUMERICS := $(addprefix tests/,operators krylov shells dynamics measurements estimators)

.DEFAULT_GOAL := help
.PHONY: help demo test test-arithmetics test-oldest test-wheels lint docs dist benchmark gpu-check study-residual clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo  ## train on digits, measure, fit, write out/*.parquet and out/*.png
	$(ONE_THREAD) $(BIN)/python demo/digits.py

test: $(VENV)/.installed-test  ## run the tests, the docstrings' examples and those of the docs
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-arithmetics: $(VENV)/.installed-test  ## run the numerical tests without vector instructions, and with AVX2 and two threads
	ATEN_CPU_CAPABILITY=default $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(NUMERICS)
	ATEN_CPU_CAPABILITY=avx2 $(TWO_THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(NUMERICS)

test-oldest: $(OLDEST)/.installed  ## run the tests with the lowest versions of pyproject.toml, in .venv-oldest
	$(ONE_THREAD) $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(OLD_WARNINGS)

test-wheels: $(VENV)/.installed-test  ## run the tests on published models, whose wheels it fetches into .wheels/
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest .wheels --requirement tests/models/published_wheels.txt
	$(ONE_THREAD) $(BIN)/python -m pytest tests/models/test_published_models.py

lint: $(VENV)/.installed-lint  ## ruff, its format check, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build the documentation; a warning is an error
	$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

dist: $(VENV)/.installed-dist  ## build wheel and sdist in dist/, check both, run the README with the wheel
	rm -rf dist *.egg-info
	$(BIN)/python -m build --outdir dist
	$(ONE_THREAD) $(BIN)/python tools/check_dist.py dist

benchmark: $(TORCH_PEERS)/.installed $(NEURAL_TANGENTS)/.installed  ## compare with other tools; writes out/benchmarks/, docs/benchmarks/
	$(TORCH_PEERS)/bin/python -m benchmarks --docs docs/benchmarks \
		--jax-python $(NEURAL_TANGENTS)/bin/python $(BENCHMARK_OPTIONS)

gpu-check: $(VENV)/.installed-demo  ## compare a GPU (else a dry run) with the CPU; writes out/gpu-check/
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK_OPTIONS)

study-residual: $(VENV)/.installed-demo  ## residual against plain networks; writes out/study-residual/, docs/studies/residual/
	$(ONE_THREAD) $(BIN)/python -m studies.residual --docs docs/studies/residual $(STUDY_OPTIONS)

clean:  ## remove what the targets made, but keep .venv
	rm -rf out build dist docs/_build docs/auto_examples docs/generated
	rm -rf docs/sg_execution_times.rst .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

# Its versions are other ones: constraints.txt does not hold here, what the tool prints does.
$(OLDEST)/.installed: export PIP_CONSTRAINT := $(CURDIR)/$(OLDEST)/constraints.txt
$(OLDEST)/.installed: export PIP_BUILD_CONSTRAINT := $(CURDIR)/$(OLDEST)/constraints.txt
$(OLDEST)/.installed: pyproject.toml tools/oldest_versions.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) tools/oldest_versions.py test > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

# Without dependencies: curvlinops asks for torchvision through a package that nothing here uses.
$(TORCH_PEERS)/.installed: pyproject.toml constraints.txt benchmarks/requirements-torch-peers.txt
	$(PYTHON) -m venv $(TORCH_PEERS)
	$(TORCH_PEERS)/bin/python -m pip install --quiet --editable ".[plot]" transformers
	$(TORCH_PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/requirements-torch-peers.txt
	$(TORCH_PEERS)/bin/python -c "import curvlinops, hessian_eigenthings"
	touch $@

# Its numpy is older than the project's: constraints.txt does not hold here.
$(NEURAL_TANGENTS)/.installed: export PIP_CONSTRAINT :=
$(NEURAL_TANGENTS)/.installed: export PIP_BUILD_CONSTRAINT :=
$(NEURAL_TANGENTS)/.installed: benchmarks/requirements-neural-tangents.txt
	$(PYTHON) -m venv $(NEURAL_TANGENTS)
	$(NEURAL_TANGENTS)/bin/python -m pip install --quiet --requirement $<
	$(NEURAL_TANGENTS)/bin/python -c "import neural_tangents"
	touch $@
