# Everything runs from a virtual environment that is made on first use and kept while
# pyproject.toml and constraints.txt stay as they are. pip's own configuration (index, proxy,
# cache) is honoured: to have PyTorch without CUDA, point it at PyTorch's CPU wheels.
#   make demo      stream a continuation from the bundled model
#   make test      checks and the quick tests    make test-all  also the slow ones
#   make lint      checks alone                  make venv      the environment alone
#   make gpu       a GPU's tests and benchmarks, figures into GPU_OUT; with GPU_PYTHON=INTERPRETER in an
#                  environment of your own that has PyTorch for your card, Triton, hypothesis, pytest, its
#                  xdist and timeout
# Settings: VENV=DIR (default .venv), PYTHON=INTERPRETER (default python3.11, else python3).

VENV ?= .venv
# Run it rather than look for it: a version manager's shim may stand for nothing installed.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)

BIN := $(VENV)/bin
# -qq: errors only
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := $(VENV)/.torch-installed
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed

# Two pytest workers: more threads in each would only fight for the cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all lint venv gpu
.DEFAULT_GOAL := demo

demo: $(CORE)
	@$(BIN)/nanoglm demo

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-all: lint
	$(PYTEST) -m "not gpu"

GPU_PYTHON ?= $(BIN)/python
GPU_OUT ?= gpu.json
# Workers compile side by side; every drawn shape is a kernel of its own, so fewer are drawn than in the interpreter.
GPU_WORKERS ?= 4

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(DEV))
	DRAWN_CASES=10 $(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) -m gpu -q tests/gpu tests/ops/triton
	$(GPU_PYTHON) -m nanoglm.bench.gpu $(GPU_OUT)

lint: $(DEV)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

venv: $(DEV)

# torch first and by itself, so that nothing which merely asks for some torch chooses another build.
$(TORCH): constraints.txt
	@echo "Making $(VENV), once; PyTorch is large ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch==2.13.0
	@touch $@

# The C++ kernels are built on installation where there is a compiler; `nanoglm doctor` tells.
KERNELS := setup.py $(wildcard csrc/*)

$(CORE): pyproject.toml $(KERNELS) $(TORCH)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml $(KERNELS) $(TORCH)
	@echo "Installing what tests and checks need ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(CORE) $@
