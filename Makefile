# Run `make` for the list of targets.
VENV    ?= .venv
FLAVOUR := $(if $(CUDA),cuda,cpu)
STAMP   := $(VENV)/.setup-$(FLAVOUR)
PYTEST_ARGS ?=
BENCH_ARGS  ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench-train bench-memory bench-kernels bench-coserve bench-overhead bench-simulate clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## build .venv (CUDA=1: for NVIDIA GPUs; PYTHON=...: with this interpreter)

$(STAMP): pyproject.toml packaging/setup.sh packaging/requirements.py packaging/vllm-cpu-shim/pyproject.toml
	@bash packaging/setup.sh $(VENV) $(FLAVOUR)
	@touch $@

demo: setup  ## a small model answers requests while a job finetunes it (about 5 minutes)
	@$(VENV)/bin/python examples/demo.py

test: setup  ## run the tests (about 20 minutes on two cores)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} timeout --foreground 2400 $(VENV)/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup  ## ruff, mypy, import direction
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

bench-train: setup  ## finetuning speed of an idle engine against transformers + peft
	@PYTHONPATH=examples $(VENV)/bin/python -m benchmarks.train

bench-memory: setup  ## bytes kept for the backward against PEFT, measured
	@PYTHONPATH=examples $(VENV)/bin/python -m benchmarks.memory

bench-kernels: setup  ## each kernel against its plain-torch reference
	@$(VENV)/bin/python -m benchmarks.kernels_cpu

bench-coserve: setup  ## serving and training together against taking turns and running side by side (about 20 minutes)
	@PYTHONPATH=examples $(VENV)/bin/python -m benchmarks.co_serving $(BENCH_ARGS)

bench-overhead: setup  ## the plugin without a job against plain vLLM; time of a plan
	@PYTHONPATH=examples $(VENV)/bin/python -m benchmarks.overhead $(BENCH_ARGS)

bench-simulate: setup  ## the real scheduler on simulated machines, 1 to 50 requests a second
	@$(VENV)/bin/python -m benchmarks.simulate $(BENCH_ARGS)

clean:  ## remove the environment, caches and demo output
	rm -rf $(VENV) .demo .bench build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
