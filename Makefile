# Two commands do everything on a fresh machine: `make demo` and `make test`. They need Python >= 3.10, a C++ compiler
# and make. If no virtual environment is active, .venv is made and filled.

TORCH ?= torch==2.13.0
# What the libraries that adapters are compared with import; torchvision 0.29.1 goes with torch 2.14.1.
CONFORMANCE_TORCH ?= torch==2.14.1 torchvision==0.29.1
PYTHON ?= python3

ifdef VIRTUAL_ENV
BIN := $(VIRTUAL_ENV)/bin
else
BIN := .venv/bin
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what is imported when it is; torch as a whole takes longer to compile than to install.
PIP := -q --no-compile
# A missing compiler is an error here; 0 builds no extension, and the tests of backend "cpp" are skipped.
export FUSED_CONTRASTIVE_EXTENSION ?= 1

.PHONY: help demo test test-full fuzz sanitize clang conformance mutants verify bench rehearsal configurations docs screenshots lint format build clean
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch first and by itself, then what builds the extension against it.
$(BIN)/.fused_contrastive-%: setup.py pyproject.toml $(wildcard csrc/*/*) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP) "$(TORCH)" "setuptools>=77" wheel ninja pybind11 numpy
	$(BIN)/python -m pip install $(PIP) --no-build-isolation -e ".[$*]"
	touch $@

demo: $(BIN)/.fused_contrastive-demo ## train a small CLIP on emoji and their names with the fused loss, beside eager
	$(BIN)/python examples/emoji_clip.py

# Three workers keep two cores busy: one of them often waits for processes that its test has started.
PARALLEL := -n 3 --dist worksteal
test: $(BIN)/.fused_contrastive-test ## run the tests
	$(BIN)/python -m pytest $(PARALLEL)

test-full: $(BIN)/.fused_contrastive-test ## run every case of the tests, which `make test` takes a choice of; an hour
	$(BIN)/python -m pytest $(PARALLEL) --full

MINUTES ?= 5
fuzz: $(BIN)/.fused_contrastive-test ## random arguments and random problems for MINUTES minutes; prints what it finds
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

sanitize: $(BIN)/.fused_contrastive-test ## run the C++ backend's tests under AddressSanitizer and UBSan
	$(BIN)/python tests/sanitize.py

# A Clang that pip installs, 101 MB to download and 411 MB on disk; CXX names another: CXX=clang++ python tests/clang.py
clang: $(BIN)/.fused_contrastive-test ## build the C++ backend with Clang, warnings as errors, and run its tests
	$(BIN)/python -m pip install $(PIP) ziglang==0.17.1
	env -u CXX $(BIN)/python tests/clang.py

# An environment of its own, with this package installed and not linked: its extension is built for another torch. Other
# versions of the libraries than those pinned, in another one, by requirements:
# make conformance OTHER="sentence-transformers==5.3.0 transformers==4.57.6"
CONFORMANCE := .venv-conformance$(if $(OTHER),-other)/bin
$(CONFORMANCE)/.libraries: pyproject.toml
	$(PYTHON) -m venv $(CONFORMANCE:/bin=)
	$(CONFORMANCE)/python -m pip install $(PIP) $(CONFORMANCE_TORCH)
	$(CONFORMANCE)/python -m pip install $(PIP) "setuptools>=77" wheel ninja pybind11 numpy
	$(CONFORMANCE)/python -m pip install $(PIP) --no-build-isolation ".[conformance]"
	$(CONFORMANCE)/python -m pip install $(PIP) --no-deps colpali-engine==0.3.18  # it asks for an older torch
	touch $@

conformance: $(CONFORMANCE)/.libraries ## compare the adapters with the libraries themselves (several GB of them)
	$(CONFORMANCE)/python -m pip install $(PIP) --no-build-isolation --no-deps --force-reinstall .
	$(if $(OTHER),$(CONFORMANCE)/python -m pip install $(PIP) $(OTHER))
	$(CONFORMANCE)/pytest tests/conformance

mutants: $(BIN)/.fused_contrastive-test $(CONFORMANCE)/.libraries ## break the sources on purpose and show that the tests notice
	$(BIN)/python tests/mutants --with-conformance $(CONFORMANCE)/python

verify: $(BIN)/.fused_contrastive-test ## compare every backend with the float64 oracle on the full grid of cases
	$(BIN)/python -m fused_contrastive verify --grid full

# Libraries that ask for torchvision come without it: their loss modules are loaded alone, or listed with the reason.
bench: $(BIN)/.fused_contrastive-bench ## time and memory beside eager, torch.compile and the libraries
	$(BIN)/python -m pip install $(PIP) --no-deps open_clip_torch==3.3.0 lightly==1.6.0
	$(BIN)/python -m benchmarks --suite cpu --out benchmarks/results

rehearsal: $(BIN)/.fused_contrastive-test ## launch every Triton kernel by Triton's own launcher, on a stand-in for a GPU's driver
	$(BIN)/python tests/rehearsal

configurations: $(BIN)/.fused_contrastive-test ## compile the Triton kernels for every architecture and write down what came out
	$(BIN)/python tools/configurations.py > docs/triton-configurations.md

docs: $(BIN)/.fused_contrastive-docs ## the documentation as a site, in site/; fails on a link that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

screenshots: $(BIN)/.fused_contrastive-screenshots ## the site's pages in headless Chromium, checked, in screenshots/
	FUSED_CONTRASTIVE_SCREENSHOTS=screenshots $(BIN)/python -m pytest tests/docs/test_site.py

lint: $(BIN)/.fused_contrastive-dev ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*/*

format: $(BIN)/.fused_contrastive-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*/*

build: $(BIN)/.fused_contrastive-dev ## a wheel and an sdist in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what was built
	rm -rf build dist site screenshots *.egg-info fused_contrastive/*.so
