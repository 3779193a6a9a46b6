# make quickstart   install, then train, measure and serve a small model on the Python standard library
# make test         install what the tests need, check style, types and layers, run the tests (about 25 minutes on 2 cores)
# make test-full    the same with the long tests
# make test-parallel  every layout and pipeline schedule against one process, in PARTS side by side (of 4 to 8 processes)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
PEERS := $(VENV)/peers
PEERS_STAMP := $(PEERS)/.installed
NO_AMX := -DCMAKE_C_FLAGS=-mno-amx-tile -DCMAKE_CXX_FLAGS=-mno-amx-tile

.PHONY: quickstart test test-full test-parallel check bench lock proto clean

quickstart: $(RUN_STAMP)
	$(BIN)/soma run recipes/quickstart.yaml

test: $(DEV_STAMP) check
	$(BIN)/python -m pytest -m "not slow and not parallel"

test-full: $(DEV_STAMP) check
	$(BIN)/python -m pytest

# As many parts as there are fours of CPUs; they share what one process trained, in a folder of their own.
test-parallel: PARTS ?= $(shell $(BIN)/python -c "import os; print(max(1, os.cpu_count() // 4))")
test-parallel: $(DEV_STAMP)
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && seq $(PARTS) | SOMA_PARITY_CACHE=$$cache xargs -P $(PARTS) -I{} \
		$(BIN)/python -m pytest -m parallel --part {}/$(PARTS)

check: $(DEV_STAMP)
	$(BIN)/ruff check soma tests benchmarks tools
	$(BIN)/ruff format --check soma tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV_STAMP) $(PEERS_STAMP)
	$(BIN)/python benchmarks/train.py --json
	$(BIN)/python benchmarks/generate.py --json
	$(BIN)/python benchmarks/engine.py --peers $(PEERS)/bin/python --json
	$(BIN)/python benchmarks/data.py --json
	$(BIN)/python benchmarks/gateway.py --json

# What benchmarks/engine.py runs beside us; llama.cpp is built for this machine (a C++ compiler and cmake, 5-10 minutes).
$(PEERS_STAMP): | $(BIN)/python
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="$(if $(shell grep -m1 amx_tile /proc/cpuinfo),$(NO_AMX))" $(PEERS)/bin/python -m pip install -q --disable-pip-version-check llama-cpp-python gguf safetensors openvino-genai onnxruntime-genai onnx-ir
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Soma needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): requirements.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

$(DEV_STAMP): requirements-dev.lock $(RUN_STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.lock
	touch $@

# Write both lock files anew from pyproject.toml (CONSTRAINTS=file to hold versions back).
lock: | $(BIN)/python
	$(BIN)/python tools/lock.py $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS))

# Write the generated code of the gRPC protocol anew from soma/serve/v2/inference.proto.
proto: $(DEV_STAMP)
	$(BIN)/python tools/proto.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
