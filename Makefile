# make demo   the whole story, small: code -> tokens -> model -> report, on the CPU
# make test   lint, types and every test that takes neither minutes nor a GPU
# A machine without a GPU saves gigabytes with TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

# A worker a core, four at most; a file's tests, which share what took long to make, stay together and in order.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-gpu test-mindspore lint types sandbox clean

demo: .venv/.ready sandbox
	$(BIN)/puna demo -o demo

test: .venv/.ready sandbox lint types
	$(BIN)/python -m pytest -m "not slow and not gpu and not mindspore" $(SIDE_BY_SIDE)

# On a machine with an accelerator.
test-gpu: .venv/.ready
	$(BIN)/python -m pytest -m gpu

# Installs MindSpore's wheel in an environment of its own, and has it read what puna writes.
test-mindspore: .venv/.ready
	$(BIN)/python -m pytest -m mindspore

test-slow: .venv/.ready sandbox
	$(BIN)/python -m pytest -m slow

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

# Installs bubblewrap, which running model code needs, where this user may; says so elsewhere.
sandbox:
	@command -v bwrap >/dev/null || scripts/install-bubblewrap || true

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "puna needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo
