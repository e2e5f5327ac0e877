# Two commands from a bare clone: `make bench` runs the main job, `make test` the tests. Each makes .venv once.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# A process a core, one thread each: threads of several processes that wait for each other cost more than they give.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

.PHONY: bench test test-gpu lint clean

bench: .venv/.installed
	$(BIN)/python benchmarks/ensemble_masked.py $(ARGS)

test: .venv/.installed lint
	TRITON_INTERPRET=1 $(TEST) -m interpret
	$(TEST) -m "not interpret and not gpu"

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -q -m gpu

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

# The environment is made again when what it is made from changes.
.venv/.installed: pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	    "mmfast is developed on Python 3.11 and 3.12, got " + sys.version + "; name one: make PYTHON=python3.11 test")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	$(BIN)/python -m mmfast.info
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
