# Each target does all its own set-up on a machine that has nothing but Python 3.11 or newer, and installs no more than
# it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where CPU builds of torch are, if pip's own index has none: make TORCH_INDEX=URL
TORCH_INDEX ?=
# Without a GPU, the versions in constraints.txt, as CI has them; with one, those that fit its driver.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
CONSTRAINTS := $(if $(GPU),,-c constraints.txt)
INSTALL = $(BIN)/python -m pip install $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# The release of torch that `make lock` pins.
TORCH := 2.13.0

OLDEST_TRITON := $(VENV)/triton-3.6.0

.PHONY: help install demo test oldest-triton lint format figures docs digests lock dist sbom clean

help:
	@echo "make demo      learn, choose, run and check: at full size on a GPU, at a small size without one"
	@echo "make test      the tests; ARGS='-k cli' are pytest's"
	@echo "make install   environment in $(VENV), with this package in it, editable"
	@echo "make oldest-triton  the oldest release of Triton, 0.6 GB, which the tests then compile with too"
	@echo "make lint      ruff and mypy"
	@echo "make format    ruff's formatter, and what it can fix"
	@echo "make figures   benchmarks/figures, from benchmarks/results and policies"
	@echo "make digests   policies/SHA256SUMS, after a shipped policy was made again"
	@echo "make docs      docs/api.md, from the docstrings"
	@echo "make lock      constraints.txt, from pyproject.toml; UPGRADE=--upgrade takes newer releases"
	@echo "make dist      sdist and wheel in dist/"
	@echo "make sbom      the wheel's bill of materials in dist/ (CycloneDX)"
	@echo "PYTHON=python3.12 is the Python of a new $(VENV), TORCH_INDEX=URL where it finds a CPU build of torch"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"expected Python 3.11 or newer, got {v[0]}.{v[1]}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(GPU),,$(BIN)/python tools/torch_build.py $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch)
	$(INSTALL) -e .
	touch $@

# What each extra in pyproject.toml adds.
$(VENV)/.extra-%: $(VENV)/.installed
	$(INSTALL) -e '.[$*]'
	touch $@

$(VENV)/.testing: $(VENV)/.extra-test
	$(BIN)/python -m pip install --no-deps flashinfer-bench==0.1.2  # see the extra `test` in pyproject.toml
	touch $@

demo: $(VENV)/.installed
	$(BIN)/hybrid-moe demo

# Two workers: kernels in the interpreter keep a core busy each. A file's tests stay in one process, as they share what
# they compile; tests/conftest.py says which files come first.
test: $(VENV)/.testing
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Aside, where only tests/test_compile.py looks: 188 MB to fetch, 641 MB on the disk, 12 s of one core in the tests.
oldest-triton: $(OLDEST_TRITON)

$(OLDEST_TRITON): $(VENV)/.installed
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

lint: $(VENV)/.extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One picture for each device, of the shipped policies: the user's own would come first otherwise.
figures: $(VENV)/.extra-report
	for device in $(notdir $(wildcard benchmarks/results/*)); do \
		$(BIN)/hybrid-moe report benchmarks/results/$$device/definition.jsonl \
			benchmarks/results/$$device/regenerate_quick.jsonl --policy policies \
			--png benchmarks/figures/$$device.png || exit 1; \
	done

# The list that shipped policies are checked by when they are read: after one was made anew.
digests:
	cd policies && sha256sum -- */*.json > SHA256SUMS

docs: $(VENV)/.installed
	$(BIN)/python docs/make_api.py

# For every Python from 3.11 on and every platform. triton is left out: a CUDA build of torch brings its own release, and
# with a CPU build CI is to see the newest.
lock: $(VENV)/.extra-release
	mkdir -p build
	echo 'torch==$(TORCH)' > build/torch.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --constraints build/torch.txt \
		--no-emit-package triton --no-annotate --custom-compile-command 'make lock' $(UPGRADE) \
		pyproject.toml --output-file constraints.txt

dist: $(VENV)/.extra-release
	$(BIN)/python -m build --no-isolation

# What `pip install hybrid-moe` brings along, at the versions in constraints.txt.
sbom: $(VENV)/.extra-release
	mkdir -p build dist
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --constraints constraints.txt --no-annotate \
		--no-header pyproject.toml --output-file build/runtime.txt
	sed "s/^dynamic = .*/version = \"$$($(BIN)/python -m hatchling version)\"/" pyproject.toml > build/pyproject.toml
	$(BIN)/cyclonedx-py requirements build/runtime.txt --pyproject build/pyproject.toml --mc-type library \
		--output-reproducible --output-file dist/hybrid-moe.cdx.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
