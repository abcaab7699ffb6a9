# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test check slow test-oldest test-newest clean

demo: $(READY)  ## prune the embedded model with four allocators, compare, draw: two to three minutes
	rm -rf demo_output
	$(BIN)/hf-sparsity demo --output demo_output

test: $(READY)  ## the default test suite: offline, CPU
	$(BIN)/python -m pytest -n 2

slow: $(READY)  ## the sweep over every causal-LM architecture, and other long tests
	$(BIN)/python -m pytest -n 2 -m slow

# The two ends of the range of releases in pyproject.toml, each in an environment of its own. ONLY="tests/..." runs less.
test-oldest: $(VENV)-oldest/.ready  ## the default suite with the oldest releases of transformers and its kin
	$(VENV)-oldest/bin/python -m pytest -n 2 $(ONLY)

test-newest: $(VENV)-newest/.torch  ## the default suite with the newest releases there are today
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]' torch==2.13.0
	$(VENV)-newest/bin/python -m pytest -n 2 $(ONLY)

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

$(VENV)-oldest/.ready: $(VENV)-oldest/.torch pyproject.toml tests/constraints-oldest.txt
	$(VENV)-oldest/bin/pip install --quiet --constraint tests/constraints-oldest.txt --editable '.[test]'
	touch $@

$(VENV)-%/.torch:
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet torch==2.13.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest demo_output build dist
