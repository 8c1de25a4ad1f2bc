# `make demo` and `make test` need Python 3.11 or newer and nothing else; both build .venv first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell git ls-files '*.py' '*.j2' '*.css' '*.js' '*.toml' '*.safetensors' | grep -v '^tests/\|^benchmarks/') setup.cfg pyproject.toml constraints.txt

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/autolabel demo

# Tests run against the normal install, not the source folder.
test: .venv/tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # their tensors are too small for several threads

lint: .venv/linted
	mkdir -p .types && ln -sfn .. .types/autolabel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/created:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

.venv/installed: .venv/created $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[test]'
	touch $@

.venv/linted: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[lint]'
	touch $@

clean:
	rm -rf .venv .types build *.egg-info
