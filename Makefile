# Every target below makes .venv and installs into it when it is missing or out of date.

PYTHON ?= python3
OUT ?= out
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What we start finds the environment's programs by name, and keeps the bytecode of what it imports,
# so that only the first start is slow.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONDONTWRITEBYTECODE=
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt
# Tests reach no network, draw no windows, and do not spin while other processes have the cores.
TEST_ENV := OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 MPLBACKEND=Agg RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The lines of one target build on those of the one before: `make -j` must not mix them.
.NOTPARALLEL:
.PHONY: help demo test test-fast test-slow test-hosts lint format tiny tiny-dynamic tiny-iss miniature install clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 names the Python that .venv is made with (now: $(PYTHON))."
	@echo "  ARGS=... is passed on, as in: make test ARGS='-k tiling'"

demo: $(STAMP) ## Caption 200 images with the embedded model; write out/report.html
	@$(RUN) $(BIN)/flashvl demo --output $(OUT) $(ARGS)

test: $(STAMP) ## Run the tests (half an hour on two CPU cores)
	@$(RUN) $(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

test-fast: $(STAMP) ## Run the tests that neither start Ray nor train (90 seconds)
	@$(RUN) $(TEST_ENV) $(BIN)/python -m pytest -m "not ray and not long and not slow and not gpu and not hosts" $(ARGS)

test-slow: $(STAMP) ## Run the tests that take minutes each
	@$(RUN) $(TEST_ENV) $(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-hosts: $(STAMP) ## Run a fleet on simulated hosts and break it (as root; half an hour)
	@$(RUN) $(TEST_ENV) $(BIN)/python -m pytest -m hosts $(ARGS)

lint: $(STAMP) ## Check style, formatting, types and the floors of the imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## Sort the imports and format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tiny: $(STAMP) ## Train the embedded model anew (up to an hour on two cores)
	@$(RUN) $(BIN)/python ray_jobs/tiny.py $@ $(ARGS)

tiny-dynamic: $(STAMP) ## Train tiny's variant with dynamic tiling
	@$(RUN) $(BIN)/python ray_jobs/tiny.py $@ $(ARGS)

tiny-iss: $(STAMP) ## Train tiny's variant with Implicit Semantic Stitching
	@$(RUN) $(BIN)/python ray_jobs/tiny.py $@ $(ARGS)

miniature: $(STAMP) ## Show the paper's comparisons in miniature, as ARGS=table6 (two hours on two cores)
	@$(RUN) $(BIN)/python ray_jobs/miniature.py $(ARGS)

install: $(STAMP) ## Make .venv and install flashvl into it

clean: ## Remove out/, caches and build leftovers; keeps .venv and runs/
	rm -rf out build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch goes first and at its exact version: another release, which a range of some other package
# may admit, can pull gigabytes of CUDA libraries. To get the CPU build where it comes from
# PyTorch's own package index, set PIP_EXTRA_INDEX_URL to that index.
# DS_BUILD_OPS=0: DeepSpeed compiles none of its ops while it is installed.
# --no-compile: most modules are never imported, and compiling them all takes a minute. The import
# at the end compiles what is, and shows that the installation works before the stamp says so.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) was not found: install Python 3.11 or later, or name one with make PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1), flashvl needs 3.11 or later: name one with make PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "Installing flashvl into $(VENV) (one to three minutes) ..."
	@rm -f $@
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP_INSTALL) torch
	@DS_BUILD_OPS=0 $(PIP_INSTALL) -e '.[dev]'
	@$(RUN) $(BIN)/python -c 'import flashvl, ray.data, ray.train.torch, torch, transformers.modeling_utils'
	@touch $@
