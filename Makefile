# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test check slow clean

demo: $(READY)  ## prune the embedded model with every allocator, compare, draw
	rm -rf demo_output
	$(BIN)/hf-sparsity demo --output demo_output

test: $(READY)  ## the default test suite: offline, CPU
	$(BIN)/python -m pytest -n 2

slow: $(READY)  ## the sweep over every causal-LM architecture, and other long tests
	$(BIN)/python -m pytest -n 2 -m slow

check: $(READY)  ## formatter, linter, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch comes first and alone: anything else that asks for it would draw the CUDA build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo_output build dist
