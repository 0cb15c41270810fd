# make setup: own .venv from the locks. Every other target goes through it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DOCS_STAMP := $(VENV)/.docs-done
LOCKS := requirements/torch.txt requirements/lock.txt requirements/demo.txt requirements/lm.txt
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
.PHONY: help setup demo lm study-smoke test test-zoo test-torch test-cpus reliability reliability-long docs lint \
	format lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 25

setup: $(STAMP) ## make .venv and install everything, pinned

# torch comes after its own dependencies, so that pip adds only what its build for this machine needs besides.
$(STAMP): pyproject.toml $(LOCKS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r requirements/lock.txt
	$(BIN)/python -m pip install -qq -r requirements/torch.txt
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r requirements/demo.txt -r requirements/lm.txt
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	touch $@

demo: setup ## train, save, verify and revert a delta of a real model, in minutes
	$(BIN)/selectune demo

lm: setup ## the same with a language model: text of its own before, after and reverted
	$(BIN)/selectune demo --model smollm

study-smoke: setup ## a small twin of every table and figure of the papers
	for name in $$(ls selectune/study/grids | sed 's/\.yaml$$//'); do \
		$(BIN)/selectune study run $$name --twin --out studies/smoke/$$name --workers $(WORKERS) || exit 1; done

test: setup ## all tests, offline
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-zoo: setup ## tiny models and odd modules against a dense oracle, in every setting (a short form is in `test`)
	ZOO=all HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/zoo $(PYTEST_ARGS)

# What depends on torch itself. The rest adds nothing there: it is arithmetic that the core's tests do not need torch's
# version for (tasks, bench), or needs packages whose newest versions are pinned in lock.txt (adapters, harness,
# integrations, cli).
CORE_TESTS := tests/test_internals.py tests/test_equality.py tests/test_readme.py tests/train tests/delta tests/ops

test-torch: ## core tests on the oldest and the newest torch, each in a venv that is kept
	PYTHON="$(PYTHON)" WORKERS="$(WORKERS)" PYTEST_ARGS="$(PYTEST_ARGS)" CORE_TESTS="$(CORE_TESTS)" \
		.ci/test-torch oldest newest

# torch, its library of products and numba choose their loops by the processor, so sums are rounded otherwise on
# another. Each line stands for a kind of x86 processor: one without AVX, and one with AVX2 but without AVX-512 and AMX.
PLAIN := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE NUMBA_CPU_NAME=generic \
	TORCHINDUCTOR_FORCE_DISABLE_CACHES=1
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=haswell \
	NUMBA_CPU_FEATURES=+avx2,+fma TORCHINDUCTOR_FORCE_DISABLE_CACHES=1

test-cpus: ## all tests, as processors without AVX and with AVX2 only would round
	env $(PLAIN) $(MAKE) test
	env $(AVX2) $(MAKE) test

# Rows that are not measured anew stay: `ONLY=ranks,signals make reliability-long` measures these two promises.
ONLY ?=
PROOF = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
	$(BIN)/python tests/reliability/report.py --workers $(WORKERS) --only "$(ONLY)"

reliability: setup ## try every promise and write RELIABILITY.md; minutes
	$(PROOF)

reliability-long: setup ## the same with more cases where there are more; an hour or so
	$(PROOF) --long

# The site can be read without a network. The pages that scripts write are written anew first.
docs: setup $(DOCS_STAMP) ## build the documentation in site/; fails on a broken link or anything loaded from elsewhere
	$(BIN)/python docs/gallery.py
	$(BIN)/python docs/commands.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/check_site.py site

$(DOCS_STAMP): requirements/docs.txt | $(STAMP)
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r requirements/docs.txt
	touch $@

lint: setup ## ruff, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup ## sort imports, format
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

lock: ## resolve requirements/lock.txt and docs.txt anew from pyproject.toml
	$(BIN)/python -m pip install -qq pip-tools==7.6.2
	$(BIN)/pip-compile --quiet --extra hf --extra generation --extra trl --extra lightning --extra bench \
		--extra plot --extra study --extra ray --extra quant --extra dev -c requirements/torch.txt \
		--unsafe-package torch --generate-hashes --strip-extras --annotation-style line --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		--output-file requirements/lock.txt pyproject.toml
	sed -i '/^# WARNING/,$$d' requirements/lock.txt
	sed -i '1i # Every package but torch, with hashes. Made by `make lock`; installed with --no-deps.' requirements/lock.txt
	$(BIN)/python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs']))" | \
		$(BIN)/pip-compile --quiet -c requirements/lock.txt --generate-hashes --strip-extras --annotation-style line \
		--no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --allow-unsafe \
		--output-file requirements/docs.txt -
	sed -i '1i # What `make docs` needs besides, with hashes. Made by `make lock`; installed with --no-deps.' requirements/docs.txt

clean: ## remove what make and the tools made
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
