# `make demo` and `make test` work on a fresh clone; CONTRIBUTING.md describes the other targets.
PYTHON ?= python3
VENV   := .venv
GPU_VENV := .venv-gpu
TRITON_VENV := .venv-triton
RAY_VENV := .venv-ray
BROWSER_VENV := .venv-browser
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OUT    ?= runs/gpu
ONLY   ?=
TOTAL  ?= 480
PREBUILT ?=
FACTOR ?= 1
SECONDS ?= 60
JOBS   ?= auto
CUTLASS := nvidia-cutlass==4.2.0.0
RECORD ?= benchmarks/records/{date}-{device}
EXTRAS := train,eval,triton,dali,nvimgcodec,remote,generate,tensorboard,parquet,bench,test,docs,lint,release

NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/host/*.cpp csrc/host/*.h kernels/*.h kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu kernels/*/*/*.h kernels/*/*/*.cu)
FUZZ := $(wildcard tests/fuzz/*.h tests/fuzz/*.cpp)

.PHONY: install demo test faults fuzz test-install test-triton test-ray test-browser lint format docs wheel bench record gpu gpu-pack gpu-rehearse clean

install: $(VENV)/native

# torch first: the extensions need its headers.
$(VENV)/packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "torch>=2.11,<2.14" "setuptools>=77" wheel cmake ninja pybind11
	$(PIP) install --quiet --no-deps $(CUTLASS) || echo "$(CUTLASS) is unavailable: its kernels are left out"
	SCENARIOCLIP_FAST_BUILD=none $(PIP) install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

$(VENV)/native: $(VENV)/packages setup.py CMakeLists.txt $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: install
	$(BIN)/scenarioclip-fast demo --out runs/demo

test: install
	$(BIN)/python -m pytest tests --ignore tests/ray -n $(JOBS) --dist loadfile

# Fault injection at full length: kills, bit flips, hostile files, damaged caches. `make test` runs a few trials of each.
faults: install
	SCENARIOCLIP_FAST_FAULTS=1 $(BIN)/python -m pytest tests/faults tests/data/packing/test_pack_resume.py tests/data/packing/test_pack_parts.py -n $(JOBS) --dist loadfile

# Fuzz the native code with AddressSanitizer and UndefinedBehaviorSanitizer, in build/fuzz.
fuzz: $(VENV)/packages
	$(BIN)/python tests/fuzz/fuzz.py --seconds '$(SECONDS)'

# Install the sdist and the wheel in empty environments, as users do.
test-install: install
	$(BIN)/python .ci/check_install.py

# The Triton kernels with the oldest supported Triton; `make test` runs them with the newest.
test-triton: install $(TRITON_VENV)/packages
	$(TRITON_VENV)/bin/python -m pytest tests/kernels tests/ops/test_contrastive.py tests/ops/test_distillation.py \
	  tests/ops/test_add_layer_norm.py tests/ops/test_quick_gelu.py tests/ops/test_short_attention.py \
	  -k "triton or compile or launches" -n $(JOBS) --dist loadfile

# Generation and packing on a Ray cluster of two nodes on this machine. One process: the tests share the cluster.
test-ray: install $(RAY_VENV)/packages
	$(RAY_VENV)/bin/python -m pytest tests/ray

# The review page in Chromium: the one on PATH, or CHROMIUM.
test-browser: install $(BROWSER_VENV)/packages
	$(BROWSER_VENV)/bin/python -m pytest tests/browser

# Environments that see the packages of .venv, with another Triton, with Ray, or with Playwright but without its browsers.
$(TRITON_VENV)/packages: PACKAGES := --no-deps "triton>=3.6,<3.7"
$(RAY_VENV)/packages: PACKAGES := "ray[data]>=2.50,<3"
$(BROWSER_VENV)/packages: PACKAGES := "playwright>=1.50"
$(TRITON_VENV)/packages $(RAY_VENV)/packages $(BROWSER_VENV)/packages: $(VENV)/packages
	$(PYTHON) -m venv --clear --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
	  > "$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(PIP) --python $(@D)/bin/python install --quiet $(PACKAGES)
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(FUZZ)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(FUZZ)

# The documentation site, in build/site; every warning is an error.
docs: install
	$(BIN)/python docs/build.py

# For Linux x86-64 with this machine's glibc or newer; the libraries of torch and CUDA are not bundled.
wheel: install
	rm -rf build/wheel
	$(BIN)/python -m build --no-isolation --wheel --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl \
	  --exclude 'libtorch*.so*' --exclude 'libc10*.so*' --exclude 'libcud*.so*' --exclude 'libnv*.so*'

bench: install
	$(BIN)/scenarioclip-fast bench --out runs/bench

# A record to commit, and the chart of README.md and docs/benchmarks.md from it. Run it on an otherwise idle machine.
record: install
	$(BIN)/scenarioclip-fast bench --out '$(RECORD)'; status=$$?; $(BIN)/python benchmarks/readme.py && exit $$status

# For a machine with a GPU, nvcc and torch, but possibly no package index: uses the installed Python and packages.
gpu:
	PYTHONPATH=benchmarks $(PYTHON) -m gpu.run --out '$(OUT)' --only '$(ONLY)' --total $(TOTAL) --factor $(FACTOR) $(if $(PREBUILT),--prebuilt)

# Collect in gpu-pack/ what such a machine needs in addition to the checkout.
gpu-pack: install $(GPU_VENV)/packages
	PYTHONPATH=benchmarks $(BIN)/python -m gpu.pack --python $(GPU_VENV)/bin/python

# Rehearse `make gpu` without a GPU, in a copy of the checkout.
gpu-rehearse: gpu-pack
	PYTHONPATH=benchmarks $(BIN)/python -m gpu.rehearse $(GPU_VENV)/bin/python runs/gpu-rehearsal --only '$(ONLY)'

# An environment like that of the GPU machine, several GB.
$(GPU_VENV)/packages: benchmarks/gpu/machine.txt
	$(BIN)/python benchmarks/gpu/like_machine.py $(GPU_VENV)
	touch $@

clean:
	rm -rf build dist $(VENV) .venv-* gpu-pack runs *.egg-info scenarioclip_fast/_native/*.so scenarioclip_fast/_native/build.json
