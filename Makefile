# make demo    set up, make a small Kimi-shaped NVFP4 checkpoint, convert, verify, restore and compare
# make test    set up and run the tests
# make check   ruff (lint and format) and mypy --strict
# make bench   host-side benchmarks

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= demo
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: setup demo test check bench clean

setup: $(STAMP)

# torch first: the constraints pin the build, and everything after it finds the requirement satisfied.
$(STAMP): pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints-dev.txt torch
	$(PIP) -c constraints-dev.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_convert.py

clean:
	rm -rf $(VENV) $(DEMO) build dist
