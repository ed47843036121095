# Every target makes what it needs; nothing else has to be typed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

# Two workers with a thread each: threads of two workers on two cores wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1

# What a processor computes is tested alike on every machine; `make gpu` has the tests that want a GPU.
NO_GPU := CUDA_VISIBLE_DEVICES=

.PHONY: demo test gpu check check-style soak bench clean

demo: $(STAMP)
	$(BIN)/koat demo

test: $(STAMP)
	$(NO_GPU) $(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist loadfile

gpu: $(STAMP)
	$(BIN)/python -m pytest -q tests/cuda tests/forest/test_tree.py tests/adapters/test_fused.py

check: test check-style

check-style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(STAMP)
	$(NO_GPU) $(ONE_THREAD) $(BIN)/python -m pytest -q -m soak -n 2 --dist loadfile --timeout 3600

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.run_all

# PyTorch first, by its exact version, so that nothing that needs it chooses another.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) koat-demo .pytest_cache .mypy_cache .ruff_cache
