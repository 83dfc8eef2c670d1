# Every command of this repository. `make demo` and `make test` work on a fresh clone.
#
#   PYTHON=python3.12      the Python that the environment is made from (3.10 or newer)
#   VENV=.venv             where the environment lies
#   TORCH=torch==2.14.1    another torch, as pip takes it: "torch==2.13.0 --index-url ..."
#   ARGS="-k conv2d -x"    more arguments for pytest or the benchmarks

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' requirements-dev.txt)
ARGS ?=

BIN := $(abspath $(VENV))/bin
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CHECKED_CXX := $(CXX_FILES) $(shell find tests/native tests/cuda_shim -name '*.h' -o -name '*.cpp' -o -name '*.cu')
ASAN_TREE := build/asan-tree
KERNEL_CHECKS := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DCMAKE_BUILD_TYPE=None \
  -DDASS_KERNEL_CHECKS=ON -S .

.PHONY: help install demo test test-full test-asan test-native test-neon gates bench lint fmt clean

help:
	@echo "make demo | test | test-full | test-asan | test-native | test-neon | gates | bench | lint | fmt | install | clean"

# The environment: torch first, so that nothing else chooses it.
$(VENV)/.tools: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	grep -v '^torch==' requirements-dev.txt | $(BIN)/pip install -q -r /dev/stdin
	touch $@

# The package, built in place: two minutes on two cores at first, then only what changed.
$(VENV)/.built: $(VENV)/.tools $(CXX_FILES) CMakeLists.txt setup.py pyproject.toml
	$(BIN)/pip install -q --no-build-isolation -e '.[test]'
	touch $@

install: $(VENV)/.built

demo: $(VENV)/.built
	$(BIN)/dass demo $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-full: $(VENV)/.built test-asan
	$(BIN)/python -m pytest $(ARGS)

# The tests that reach the kernels, against a copy built with AddressSanitizer and UBSan. Preloaded
# with the sanitizer comes libstdc++, whose exceptions it has to see; torch's leaks are not ours.
# pytest must neither swallow what a sanitizer says nor catch its signals.
test-asan: $(VENV)/.built
	rm -rf $(ASAN_TREE)/dass $(ASAN_TREE)/dass_kernels $(ASAN_TREE)/tests
	CXX=g++ DASS_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(ASAN_TREE)
	cp -r tests pyproject.toml $(ASAN_TREE)
	cd $(ASAN_TREE) && PYTHONPATH=.:$(CURDIR) PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -m "not slow" --capture=sys -p no:faulthandler \
	  $$(grep -l dass_kernels tests/test_*.py) $(ARGS)

# Every kernel of this processor's tables in a program of its own, without torch.
test-native: $(VENV)/.tools
	$(KERNEL_CHECKS) -B build/native
	$(BIN)/cmake --build build/native
	build/native/check_kernels $(ARGS)

# The same for NEON, cross-compiled and emulated: a Cortex-A53 has the first version of the
# instruction set and nothing that came later.
test-neon: $(VENV)/.tools
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
	  { echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(KERNEL_CHECKS) -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/neon
	qemu-aarch64 -cpu cortex-a53 build/neon/check_kernels $(ARGS)

# The CUDA kernels without a GPU: emulated by the processor, and compiled where nvcc is found.
gates: $(VENV)/.built
	cd tests && PYTHONPATH=$(CURDIR) $(BIN)/python -m cuda_shim.gates $(ARGS)

bench: $(VENV)/.built
	$(BIN)/python -m bench $(ARGS)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CHECKED_CXX)
	$(BIN)/python scripts/check_arrows.py

fmt: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CHECKED_CXX)

# All that is built; the environment stays (rm -r $(VENV) removes it).
clean:
	rm -rf build dist *.egg-info dass_kernels/*.so $(VENV)/.built
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find bench dass dass_kernels scripts tests -name __pycache__ -prune -exec rm -rf {} +
