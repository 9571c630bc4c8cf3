# Two commands do everything on a fresh machine: `make generate` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?= A serene landscape with mountains and a lake at sunset

.PHONY: help setup generate test test-networks test-others test-slow test-lowest lint types bench bench-gpu wheel-smoke docs clean

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

# Tests of networks, loading, plans, pages and sweeps, which take as long as all the others together.
HALF := $(foreach name,native parity kernels transformer_weights lora load component page_commands legal plan \
	diffusers_picture single_file quantization cuda_graphs estimate traffic shipped_sweeps,tests/test_$(name)*.py)

test: $(STAMP)  ## the test suite, in two processes of one thread (at most 15 minutes on two cores)
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 --output-sync=line test-networks test-others

test-slow: $(STAMP)  ## the slow tests, likewise (at most 30 minutes more)
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 --output-sync=line PICK="-m slow" test-networks test-others

test-networks: $(STAMP)
	$(BIN)/python -m pytest -p no:cacheprovider $(PICK) $(wildcard $(HALF))

test-others: $(STAMP)
	$(BIN)/python -m pytest -p no:cacheprovider $(PICK) $(filter-out $(wildcard $(HALF)),$(wildcard tests/test_*.py))

test-lowest: constraints-lowest.txt  ## the test suite with the lowest versions that pyproject.toml admits
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -W default # what old versions warn of is mended in new ones

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

wheel-smoke: $(STAMP)  ## build the wheel, install it in a clean environment, generate outside of the checkout
	PYTHON=$(BIN)/python tools/wheel_smoke.sh

docs: $(STAMP)  ## check the pages: run every command in README.md and docs/, look for every key, option and link
	$(BIN)/python -m pytest tests/test_documentation.py tests/test_page_commands.py

clean:  ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
