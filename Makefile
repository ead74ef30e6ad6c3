# Knobs: PYTHON (makes the environment), VENV (where it is), TORCH (what to install as torch), NVCC.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch
NVCC   ?= nvcc

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet
SOURCES := CMakeLists.txt pyproject.toml README.md $(wildcard csrc/* recipes/*) $(shell find python -type f ! -name '*.pyc')
PLUGINS := $(patsubst plugins/%/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.DEFAULT_GOAL := help
.PHONY: help develop demo test plugins lint bench sanitize cuda clean

help:  ## list what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/'

# An environment with irlvla and one of its extras. `dev` holds all of `test`.
$(VENV)/.irlvla-%: $(SOURCES) | $(BIN)/python
	$(PIP) "$(TORCH)" ".[$*]"
	@touch $@ $(VENV)/.irlvla-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

develop: | $(BIN)/python  ## editable install; again after a change of C++, which then compiles only what changed
	$(PIP) "scikit-build-core>=1.0" "pybind11>=3.0" cmake ninja
	$(PIP) --no-build-isolation "$(TORCH)" --editable ".[dev]"
	@touch $(VENV)/.irlvla-dev $(VENV)/.irlvla-test

demo: $(VENV)/.irlvla-test  ## all stages and the report, in the embedded world; again where it was stopped
	$(BIN)/irlvla train recipes/demo.yaml

# The plugins of this repository, each from its own folder, as anybody would install it. What an earlier build left there could
# bring back deleted modules.
$(VENV)/.irlvla-plugins: $(VENV)/.irlvla-test $(shell find plugins -name '*.py' -o -name pyproject.toml)
	rm -rf plugins/*/build
	$(PIP) $(PLUGINS:%=./plugins/%)
	@touch $@

test: plugins  ## every test that this machine can run
	$(BIN)/python -m pytest

plugins: $(VENV)/.irlvla-plugins  ## the conformance kit on each plugin of this repository, and its own tests
	@set -e; for plugin in $(PLUGINS); do \
	  echo "== $$plugin"; $(BIN)/irlvla plugins check $$plugin; $(BIN)/python -m pytest plugins/$$plugin/tests; done

lint: $(VENV)/.irlvla-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.irlvla-test  ## speed, each result verified first
	@set -e; for script in bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

# A second copy of the package, beside the one in the environment. Python itself is not instrumented, so the runtime is
# preloaded, with libstdc++ for its hooks into exceptions; -s lets its reports through, since it ends the process at once.
SANITIZED := $(CURDIR)/build/sanitize
sanitize: $(VENV)/.irlvla-test  ## a million random candidates under the address and undefined-behaviour sanitizers
	SKBUILD_CMAKE_DEFINE=IRLVLA_SANITIZE=ON SKBUILD_INSTALL_STRIP=false SKBUILD_BUILD_DIR=$(SANITIZED)/cmake \
	  $(PIP) --no-deps --upgrade --target $(SANITIZED)/site .
	@PYTHONPATH=$(SANITIZED)/site $(BIN)/python -c 'import irlvla; assert irlvla.__file__.startswith("$(SANITIZED)")' 2>/dev/null \
	  || { echo "The editable install in $(VENV) hides the sanitized copy: make sanitize VENV=.venv/sanitize"; exit 1; }
	PYTHONPATH=$(SANITIZED)/site PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  IRLVLA_FUZZ=$${IRLVLA_FUZZ:-1000000} $(BIN)/python -m pytest -s tests/test_fuzz.py

cuda: $(patsubst csrc/%.cu,build/cuda/%.o,$(wildcard csrc/*.cu))  ## compile the CUDA sources for sm_80, sm_90 and sm_100; no GPU needed
build/cuda/epdms.o: EXACT := --fmad=false
build/cuda/%.o: csrc/%.cu $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O3 $(EXACT) $(foreach arch,80 90 100,-gencode arch=compute_$(arch),code=sm_$(arch)) --threads 0 -c $< -o $@

clean:  ## remove what was built; the environment stays
	rm -rf build dist plugins/*/build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.irlvla-*
