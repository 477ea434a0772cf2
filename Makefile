# Targets for people and for CI; each one works from a clean clone. `make` lists them.
#
#   make serve ARGS="--port 9000"          more arguments for `antares serve`
#   make test PYTEST_ARGS="-k ledger"      more arguments for pytest ("-n0 --pdb" for one process and a debugger)
#   make install TORCH_INDEX_URL=...       where to get torch alone, such as PyTorch's CPU index (docs/install.md)
#   make install PYTHON=python3.12         which Python to build .venv with

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

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test check figures format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMPS)/run ## create .venv with vLLM on CPU and the gateway
	@$(BIN)/python -m engine_adapter.vllm.smollm2

serve: install ## start the gateway in front of vLLM on CPU with a small model
	@exec $(BIN)/antares serve --config $(CONFIG) $(ARGS)

test: $(STAMPS)/dev ## run every test: first without an engine, with coverage, then against a real vLLM
	@unit=0; engine=0; export HF_HUB_OFFLINE=1; \
	echo "==> tests without an engine"; \
	$(BIN)/python -m pytest -m "not engine" -n logical --maxprocesses 4 --dist loadfile \
		--cov --cov-report=term:skip-covered $(PYTEST_ARGS) || unit=$$?; \
	echo "==> tests against a real vLLM"; \
	$(BIN)/python -m pytest -m engine $(PYTEST_ARGS) || engine=$$?; \
	echo "==> exit codes: without an engine $$unit, against a real vLLM $$engine"; \
	test $$unit -eq 0 && test $$engine -eq 0

check: $(STAMPS)/dev ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

figures: $(STAMPS)/dev ## simulate every figure of docs/results again (minutes; no engine, no GPU)
	@$(BIN)/python -m benchmarks.figures

format: $(STAMPS)/dev ## let ruff format the code and fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv and everything that tools left; the prepared model in ~/.cache stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, so that a second `make serve` installs nothing. pyproject.toml is the one place that names versions: when it
# changes, the project is installed again, and the engine only if the `cpu` extra itself changed (cpu.txt).

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Antares needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments: apt-get install python3-venv (or your system's name for it)."; exit 1; }
	@echo "==> Installing into $(VENV): about 2 minutes and 3 GB of disk, once"
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
	@echo "==> the gateway (about 5 s)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/engine
	@echo "==> the gateway and the tools that test it (about 20 s)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(STAMPS)/run
