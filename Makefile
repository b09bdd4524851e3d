# Two commands matter: `make quickstart` runs the whole chain on a small real model, `make test` runs the tests.
# Each sets up what it needs first. PYTHON=/path/to/python3.12 chooses the interpreter for the environment.
SHELL := /bin/bash
PY := .venv/bin/python
RECIPE ?= examples/quickstart.yaml
PYTEST_ARGS ?= -n 2 --dist loadfile # tests of one file share what they make

.PHONY: help setup quickstart test test-fast test-quickstart test-slurm test-distributed check format wheel

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## make or repair the environment in .venv (about 2 minutes, 6.9 GB, the first time)
	@bash scripts/setup.sh

quickstart: setup ## the whole chain on SmolLM2-135M, no GPU needed; goes on where it was stopped
	@$(PY) tools/fetch_quickstart_models.py
	@.venv/bin/l0moe run $(RECIPE)

serve-setup: setup ## make the environment in .venv-serve that has vLLM's CPU build (3.5 GB; 2 to 5 minutes)
	@bash scripts/setup_serve.sh

serve-check: serve-setup ## serve an exported L0-MoE with vLLM and compare its log-probabilities; MODEL=folder
	@$(PY) tools/serve_check.py $(if $(MODEL),--model $(MODEL))

test: setup ## all tests; those on the test cluster and on the real model come last and alone
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) -m "not slurm and not quickstart"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slurm --durations=10
	@$(PY) -m pytest -m quickstart --durations=3

test-fast: setup ## what a commit needs: the tests that are neither slow nor in several processes; under 4 minutes on two cores
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) -m "not slow and not slurm and not quickstart and not distributed"

test-quickstart: setup ## the quickstart's chain on its real model with next to no tokens; needs the network once
	@$(PY) -m pytest -m quickstart --durations=3

test-slurm: setup ## the tests on a real Slurm of three virtual nodes on this machine; needs root
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slurm --durations=10

test-distributed: setup ## the tests that start several processes; prints the table of layouts
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) -m distributed
	@sed -n '/^| layout/,/^$$/p' docs/parallel.md

check: setup ## lint, format, types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup ## apply the formatter and the safe lint fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

wheel: setup ## build the wheel into dist/
	@$(PY) -m build --wheel --no-isolation
