# `make demo` and `make test` work on a fresh clone with nothing before them; the rest is in CONTRIBUTING.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OUT    ?= runs/gpu
RECORD ?= benchmarks/records/{date}-{device}
EXTRAS := train,eval,triton,dali,remote,tensorboard,test,lint

NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/host/*.cpp kernels/*.h kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu)

.PHONY: install demo test lint format bench record gpu clean

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

# For a machine with a GPU, nvcc and torch, but possibly no registry: takes the Python and the packages that are there.
gpu:
	PYTHON=$(PYTHON) OUT=$(OUT) bash benchmarks/gpu.sh

clean:
	rm -rf build $(VENV) runs *.egg-info scenarioclip_fast/_native/*.so scenarioclip_fast/_native/build.json
