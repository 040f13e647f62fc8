# `make demo` and `make test` work on a fresh clone with nothing before them; the rest is in CONTRIBUTING.md.
PYTHON ?= python3
VENV   := .venv
GPU_VENV := .venv-gpu
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OUT    ?= runs/gpu
ONLY   ?=
TOTAL  ?= 480
FACTOR ?= 1
RECORD ?= benchmarks/records/{date}-{device}
EXTRAS := train,eval,triton,dali,remote,tensorboard,bench,test,lint,release

NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/host/*.cpp kernels/*.h kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu)

.PHONY: install demo test lint format bench record gpu gpu-pack gpu-rehearse clean

install: $(VENV)/native

# torch first: building the compiled parts needs its headers, in the version that will load them.
$(VENV)/packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "torch>=2.11,<2.14" "setuptools>=77" wheel cmake ninja pybind11
	SCENARIOCLIP_FAST_BUILD=none $(PIP) install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

$(VENV)/native: $(VENV)/packages setup.py CMakeLists.txt $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: install
	$(BIN)/scenarioclip-fast demo --out runs/demo

test: install
	$(BIN)/python -m pytest tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: install
	$(BIN)/scenarioclip-fast bench --out runs/bench

# A record to commit, and the tables of README.md from it. The machine should have nothing else to do.
record: install
	$(BIN)/scenarioclip-fast bench --out '$(RECORD)'; status=$$?; $(BIN)/python benchmarks/readme.py && exit $$status

# For a machine with a GPU, nvcc and torch, but possibly no package index: uses the installed Python and packages.
gpu:
	PYTHONPATH=benchmarks $(PYTHON) -m gpu.run --out '$(OUT)' --only '$(ONLY)' --total $(TOTAL) --factor $(FACTOR)

# What travels to such a machine beside the checkout, in gpu-pack/.
gpu-pack: install $(GPU_VENV)/packages
	PYTHONPATH=benchmarks $(BIN)/python -m gpu.pack --python $(GPU_VENV)/bin/python

# `make gpu` without a GPU, from an unpacked copy.
gpu-rehearse: gpu-pack
	PYTHONPATH=benchmarks $(BIN)/python -m gpu.rehearse $(GPU_VENV)/bin/python runs/gpu-rehearsal --only '$(ONLY)'

# An environment like that machine's, several GB.
$(GPU_VENV)/packages: benchmarks/gpu/machine.txt
	$(BIN)/python benchmarks/gpu/like_machine.py $(GPU_VENV)
	touch $@

clean:
	rm -rf build $(VENV) $(GPU_VENV) gpu-pack runs *.egg-info scenarioclip_fast/_native/*.so scenarioclip_fast/_native/build.json
