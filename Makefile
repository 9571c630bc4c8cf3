# Two commands do everything on a fresh machine: `make generate` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?= A serene landscape with mountains and a lake at sunset

.PHONY: help setup generate check test test-slow test-all test-lowest lint types bench bench-gpu gpu-first wheel-smoke docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP)  ## virtual environment with everything installed

generate: $(STAMP)  ## a picture from the embedded model, outputs/generated_image_0.png on a fresh clone
	$(BIN)/sglang generate --prompt "$(PROMPT)" --seed 42

# Processes of one thread; a file's tests run in one of them, and so do all that share ranks (tests/lib/tiers.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider --dist loadfile --numprocesses

check: lint types $(STAMP)  ## lint, types and the tests that start nothing: before every commit
	$(PYTEST) 2 -m "not whole and not slow and not bench"

test: $(STAMP)  ## the test suite: those of make check, and whole runs, ranks, pages
	$(PYTEST) 3  # some of its tests wait for processes that they start

test-slow: $(STAMP)  ## what make test leaves out: compilation, training, sweeps, variants of what another test says
	$(PYTEST) 2 -m slow

test-all: test test-slow  ## both, as .ci/run does

test-lowest: constraints-lowest.txt  ## the test suite with the lowest versions that pyproject.toml admits
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -W default # what old versions warn of is mended in new ones

lint: $(STAMP)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

bench: $(STAMP)  ## benchmarks: start, composition, a picture (pytest-benchmark), a denoising step beside its peers
	$(BIN)/python -m pytest -m bench tests/bench
	$(BIN)/python -m tools.bench.networks
	$(BIN)/python -m tools.bench.start

bench-gpu: $(STAMP)  ## on a GPU: whole pictures of SDXL and FLUX.1 dev with random weights, beside diffusers
	$(BIN)/python -m tools.bench.pictures --device cuda --work sdxl,flux_dev

gpu-first: $(STAMP)  ## on a GPU: the first eight minutes, what works, what fails and how fast it is, in gpu_first.md
	$(BIN)/python -m tools.gpu_first

wheel-smoke: $(STAMP)  ## build the wheel, install it in a clean environment, generate outside of the checkout
	PYTHON=$(BIN)/python tools/wheel_smoke.sh

docs: $(STAMP)  ## check the pages: run every command in README.md and docs/, look for every key, option and link
	$(BIN)/python -m pytest tests/test_documentation.py tests/test_page_commands.py

clean:  ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
