# Everything here needs Python 3.11 or newer and git; the first of these commands builds .venv.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := $(shell git ls-files '*.py' '*.j2' '*.css' '*.js' '*.json' '*.typed' '*.safetensors' | grep -v '^tests/\|^benchmarks/') \
	setup.cfg pyproject.toml constraints.txt
# One thread each: the tensors of the tests are too small for several. Files stay together, for what they prepare.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# What no computer has fewer of: no figure may depend on the instructions of the machine that made it.
PLAIN := ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default AUTOLABEL_TESTS_WITHOUT=kornia_rs,zlib_ng
NUMERIC := tests/manifests/test_scores.py tests/manifests/test_images.py tests/manifests/test_headers.py \
	tests/manifests/test_png_decoder.py tests/student/test_data.py tests/teacher tests/student/test_losses.py tests/student/test_evaluate.py \
	tests/pipeline/test_audit.py tests/pipeline/test_calibration.py tests/pipeline/test_weighed.py

.PHONY: help demo dev quick test kinds readers plain bench lint types format docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile | expand -t 16

demo: .venv/installed  ## draw a city, label it, see what came back
	$(BIN)/autolabel demo

dev: .venv/editable  ## install this folder so that edits count at once, with all that tests and lint need

quick: .venv/editable  ## the tests that take less than a minute together; for every edit
	$(PYTEST) -m "not slow and not gpu and not thorough"

test: .venv/tested  ## all tests but the slow ones, against the normal install; before a pull request
	$(PYTEST)

kinds: .venv/tested  ## every kind of teacher the whole way, and the published networks at full size
	$(PYTEST) -m slow tests/kinds tests/teacher/test_network.py

readers: .venv/tested  ## exports read by the real readers of other tools, each in an environment of its own
	$(BIN)/python -m pytest -m slow tests/readers

plain: .venv/tested  ## the tests of numbers once more: oldest instructions of torch, PNGs by Pillow alone
	$(PLAIN) $(PYTEST) $(NUMERIC)

bench: .venv/editable  ## labelling beside a plain loop, the pipeline of transformers and Ray Data; takes minutes
	$(BIN)/python benchmarks/peers.py

lint: .venv/linted types  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/linted  ## types alone
	mkdir -p .types && ln -sfn .. .types/autolabel
	$(BIN)/mypy

format: .venv/linted  ## mend what lint would complain of, as far as that can be done without thinking
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/editable  ## write docs/cli.md anew, from the help of the commands
	$(BIN)/python docs/make_cli.py

clean:  ## remove what was built, .venv too
	rm -rf .venv .types build *.egg-info

.venv/created:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# The install is either a copy or a link to this folder: each replaces the other.
.venv/installed: .venv/created $(SOURCES)
	rm -rf build .venv/editable
	$(PIP) .
	touch $@

.venv/editable: .venv/created setup.cfg pyproject.toml constraints.txt
	rm -rf build .venv/installed .venv/tested
	$(PIP) --editable '.[test,lint,dev]'
	touch $@

.venv/tested: .venv/created $(SOURCES)
	rm -rf build .venv/editable
	$(PIP) '.[test]'
	touch .venv/installed $@

.venv/linted: .venv/created setup.cfg constraints.txt
	test -e .venv/editable || $(PIP) '.[lint]'
	touch $@

