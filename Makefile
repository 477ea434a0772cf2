# Every target works from a clean clone. `make` lists them.
#
#   make serve ARGS="--port 9000"          arguments for `antares serve`
#   make test PYTEST_ARGS="-k ledger"      arguments for pytest ("-n0 --pdb" for one process and a debugger)
#   make install TORCH_INDEX_URL=...       package index for torch only, such as PyTorch's CPU index (docs/install.md)
#   make install PYTHON=python3.12         the Python to create .venv with

PYTHON ?= python3
TORCH_INDEX_URL ?=
CONFIG ?= configs/quickstart.yaml
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# pytest keeps the tests that it has compiled with their assertions, which saves 6 s in each of its processes.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test coverage check figures format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMPS)/run ## create .venv with vLLM on CPU and the gateway
	@$(BIN)/python -m engine_adapter.vllm.smollm2

serve: install ## start the gateway with vLLM on CPU and a small model
	@exec $(BIN)/antares serve --config $(CONFIG) $(ARGS)

# Each engine has one thread and is bound to no core, so that it leaves CPU time to the gateway and to a second engine.
# With PYTEST_ARGS, a phase may have no tests (pytest's exit code 5).
test: $(STAMPS)/dev ## run all tests: of the product, with processes, of the studies, then with a real vLLM
	@summary=; failed=0; export HF_HUB_OFFLINE=1; \
	phase() { \
		title=$$1; shift; echo "==> tests $$title"; began=$$(date +%s); \
		env "$$@" $(PYTEST_ARGS); code=$$?; \
		test $$code -eq $(if $(strip $(PYTEST_ARGS)),5,0) || test $$code -eq 0 || failed=1; \
		summary="$$summary$$(printf '%5d s, exit code %d: tests %s' $$(($$(date +%s) - began)) $$code "$$title")|"; \
	}; \
	run="$(BIN)/python -m pytest --dist loadfile --durations 5 --durations-min 20"; one_thread="VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1"; \
	phase "of the product, without an engine" $$run -n logical --maxprocesses 4 -m "not engine and not study and not process"; \
	phase "of the product with processes and in real time" $$run -n 4 -m "process and not engine and not study"; \
	phase "of the studies in benchmarks/" $$run -n logical --maxprocesses 4 -m "study and not engine"; \
	phase "with a real vLLM" $$one_thread $$run -n 2 -m "engine and not alone"; \
	phase "that judge times of a real vLLM" $$one_thread $$run -n 0 -m "engine and alone"; \
	echo "==> summary"; printf '%s' "$$summary" | tr '|' '\n'; \
	exit $$failed

coverage: $(STAMPS)/dev ## run the tests without an engine and report line and branch coverage (minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not engine" -n logical --maxprocesses 4 --dist loadfile \
		--cov --cov-report=term:skip-covered $(PYTEST_ARGS)

check: $(STAMPS)/dev ## run ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

figures: $(STAMPS)/dev ## regenerate all figures of docs/results by simulation (minutes; no GPU)
	@$(BIN)/python -m benchmarks.figures

format: $(STAMPS)/dev ## format the code and apply ruff's automatic fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, builds and caches, but not the model in ~/.cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files, so that a second `make serve` installs nothing. A change of pyproject.toml, which holds all versions,
# reinstalls the project. It reinstalls the engine only if the `cpu` extra changed (cpu.txt).

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Antares needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
		echo "Use another one: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot create virtual environments: apt-get install python3-venv (or your system's package of it)."; exit 1; }
	@echo "==> installing into $(VENV), once: about 2 minutes and 3 GB of disk"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/cpu.txt: pyproject.toml $(STAMPS)/venv
	@$(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cpu"])' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(STAMPS)/engine: $(STAMPS)/cpu.txt deploy/install_engine.py
	@$(BIN)/python deploy/install_engine.py cpu --torch-index-url "$(TORCH_INDEX_URL)"
	@touch $@

$(STAMPS)/run: pyproject.toml $(STAMPS)/engine
	@echo "==> installing the gateway (about 5 s)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/engine
	@echo "==> installing the gateway and the development tools (about a minute)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(STAMPS)/run
