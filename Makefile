# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JAVASCRIPT := examples/javascript
TEST_PROCESSES ?= 2  # each of some 2 GB
SOURCES := pyproject.toml setup.py build_backend.py CMakeLists.txt $(shell find csrc -type f)
CPP_SOURCES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# One architecture of the CUDA search, the GPU's where one is here: all six take five times as long.
ifndef CNNRNN_CUDA_ARCHITECTURES
CNNRNN_CUDA_ARCHITECTURES := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
  2>/dev/null | head -1 | tr -d .),80)
endif
export CNNRNN_CUDA_ARCHITECTURES

.PHONY: demo test javascript lint format sanitize kernel-report gpu-check bench scenes-model clean

# Train, measure, predict and compare on synthetic scenes; everything lands in demo/.
demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --out demo

# Install what the tests need and pass them.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

# What the JavaScript example and its tests need. A script of onnxruntime-node would download CUDA
# libraries; nothing needs the scripts.
javascript: $(JAVASCRIPT)/node_modules/.package-lock.json

# The linters of CI; tests come before.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# The search under AddressSanitizer, UBSan and ThreadSanitizer, built in build/sanitize.
sanitize: $(VENV)/installed-dev
	$(BIN)/python -m tests.kernels.sanitizers.run

# What nvcc makes of the CUDA kernels, for every architecture: registers, spills, instructions.
kernel-report: $(VENV)/installed-dev
	$(BIN)/python -m tests.kernels.reports.report --out build/kernel-report

# On a machine with a GPU: build for it, test, check memory and races, time; one JSON with COMMIT in
# it. With the Python that has torch, and nothing installed.
gpu-check:
	$(PYTHON) -m tests.kernels.gpu.check --commit "$(COMMIT)" $(ARGS)

# Time the search against its opponents, and make the documentation's tables from the figures.
bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.search.heads  # trains them where they are not there yet
	$(BIN)/python -m pytest benchmarks --full --benchmark-json=build/benchmarks.json
	$(BIN)/python -m benchmarks.tables build/benchmarks.json benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.tables benchmarks/results/cpu.json

# Train the model that ships in the package anew, and measure it on scenes of another seed.
scenes-model: $(VENV)/installed
	$(BIN)/python examples/train_scenes_model.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "torch>=2.11"  # before the build, which would fetch one of its own

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -e ".[vision,report]"
	touch $@

$(VENV)/installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -e ".[dev]"
	touch $@ $(VENV)/installed

$(JAVASCRIPT)/node_modules/.package-lock.json: $(JAVASCRIPT)/package-lock.json
	cd $(JAVASCRIPT) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

clean:
	rm -rf build demo $(JAVASCRIPT)/node_modules *.egg-info cnnrnn/_C*.so cnnrnn/_build_info.py
