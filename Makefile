# make setup: own .venv from the locks. Every other target goes through it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
LOCKS := requirements/torch.txt requirements/lock.txt requirements/demo.txt
WORKERS ?= 2
PYTEST_ARGS ?=

# Benchmark data, where it lies beside or inside the checkout.
ifndef SELECTUNE_DATA
SELECTUNE_DATA := $(firstword $(wildcard ../shared/data shared/data))
endif
ifneq ($(SELECTUNE_DATA),)
export SELECTUNE_DATA := $(abspath $(SELECTUNE_DATA))
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format lock clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 20

setup: $(STAMP) ## make .venv and install everything, pinned

# torch comes after its own dependencies, so that pip adds only what its build for this machine needs besides.
$(STAMP): pyproject.toml $(LOCKS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r requirements/lock.txt
	$(BIN)/python -m pip install -qq -r requirements/torch.txt
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r requirements/demo.txt
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	touch $@

demo: setup ## train, save, verify and revert a delta of a real model, in minutes
	$(BIN)/selectune demo

test: setup ## all tests, offline
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: setup ## ruff, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup ## sort imports, format
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

lock: ## resolve requirements/lock.txt anew from pyproject.toml
	$(BIN)/python -m pip install -qq pip-tools==7.6.2
	$(BIN)/pip-compile --quiet --extra hf --extra trl --extra lightning --extra bench --extra plot --extra dev -c requirements/torch.txt \
		--unsafe-package torch --generate-hashes --strip-extras --annotation-style line --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		--output-file requirements/lock.txt pyproject.toml
	sed -i '/^# WARNING/,$$d' requirements/lock.txt
	sed -i '1i # Every package but torch, with hashes. Made by `make lock`; installed with --no-deps.' requirements/lock.txt

clean: ## remove what make and the tools made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
