# `make demo` and `make test` do all their own set-up on a machine that has nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Without a GPU, a CPU build of torch: see constraints.txt.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints.txt)

OLDEST_TRITON := $(VENV)/triton-3.6.0

.PHONY: oldest-triton help install demo test lint format figures digests clean

help:
	@echo "make install   environment in $(VENV), with this package in it, editable"
	@echo "make demo      learn, choose, run and check: at full size on a GPU, at a small size without one"
	@echo "make test      the tests"
	@echo "make oldest-triton  the oldest release of Triton, 0.6 GB, which the tests then compile with too"
	@echo "make lint      ruff and mypy"
	@echo "make figures   benchmarks/figures anew, from benchmarks/results and policies"
	@echo "make digests   policies/SHA256SUMS anew, after a shipped policy was made anew"
	@echo "make format    ruff's formatter, and the mends that it can make by itself"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is wanted, this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(CONSTRAINTS) -e '.[test]'
	$(BIN)/python -m pip install --no-deps flashinfer-bench==0.1.2  # see the extra `test` in pyproject.toml
	touch $@

demo: $(INSTALLED)
	$(BIN)/hybrid-moe demo

# Two workers: kernels in the interpreter keep a core busy each. A file's tests stay in one process.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Aside, where only tests/test_compile.py looks: 188 MB to fetch, 641 MB on the disk, 12 s of one core in the tests.
oldest-triton: $(OLDEST_TRITON)

$(OLDEST_TRITON): $(INSTALLED)
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One picture a device, of the shipped policies: the user's own would come first otherwise.
figures: $(INSTALLED)
	for device in $(notdir $(wildcard benchmarks/results/*)); do \
		$(BIN)/hybrid-moe report benchmarks/results/$$device/*.jsonl --policy policies \
			--png benchmarks/figures/$$device.png || exit 1; \
	done

# The list that shipped policies are checked by when they are read: after one was made anew.
digests:
	cd policies && sha256sum -- */*.json > SHA256SUMS

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
