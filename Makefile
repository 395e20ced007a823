# make demo | test | test-all | test-paths | test-quantized | docs | sanitize | lint | package | fuzz | soak | clean. Everything is
# installed in .venv; the tested torch is pinned in constraints.txt.
PYTHON ?= python3
TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard build_backend/*.py csrc/*.* csrc/*/*)

.PHONY: demo chromium test test-all test-paths test-quantized docs sanitize lint package fuzz fuzz-atheris soak clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/vlmteacher demo

# One process per core, one thread in each.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --benchmark-disable

# Debian's browser for tests/browser, where this is root; without one they are skipped.
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& export DEBIAN_FRONTEND=noninteractive && timeout 120 apt-get update -qq \
	&& timeout 400 apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 \
	|| echo "chromium is not installed here: the tests of pages are skipped"

test: chromium .venv/installed-dev
	$(PYTEST)

# All slow tests too, of which `make test` runs a seventh or less, others every day; and the coverage, which takes half
# of a test's time again.
test-all: chromium .venv/installed-dev
	$(PYTEST) --slow=all --cov=vlmteacher --cov-report=term --cov-fail-under=85

# The numeric tests as on older processors: a table of path, passed and failed.
test-paths: .venv/installed-dev
	$(BIN)/python -m tests.vendor_paths --write docs/results/vendor_paths.md

# The tests of quantised models with the packages of the extra [quantized], which diffusers and PEFT import wherever they
# are found: so they stand in a folder of their own.
test-quantized: build/quantized/installed
	PYTHONPATH="$(CURDIR)/build/quantized" $(PYTEST) tests/reasoners/test_quantization.py tests/teachers/test_quantization.py

build/quantized/installed: .venv/installed-dev
	rm -rf build/quantized
	$(PIP) install -q --no-deps --target build/quantized 'bitsandbytes>=0.50' 'torchao>=0.18'
	touch $@

# The documentation's site in build/site: no broken link, and nothing that its pages would load from outside.
docs: .venv/installed-dev
	$(BIN)/python -m tools.docs_site

# The C++ operators on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer, built into build/sanitize.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -g1
SANITIZED_TESTS := tests/trust/test_guard_pages.py tests/ops/test_elementwise.py tests/ops/test_qk_norm_rope.py \
  tests/ops/test_surrogate_decoder.py -k "not compile and not fake and not opcheck and not trace"

sanitize: build/sanitize/installed
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -q -p no:cacheprovider -o pythonpath="build/sanitize ." $(SANITIZED_TESTS)

build/sanitize/installed: .venv/installed-dev $(BUILD)
	rm -rf build/sanitize
	CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(PIP) install -q --no-deps --target build/sanitize .
	touch $@

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The sdist, the wheel that is built from it, and the wheel's demo in an empty environment and an empty directory.
# auditwheel names the oldest Linux that the wheel runs on; torch's own libraries come with torch.
PACKAGE := build/package

package: .venv/installed-dev
	rm -rf $(PACKAGE) && mkdir -p $(PACKAGE)/empty
	$(BIN)/python -m build -q --sdist --outdir $(PACKAGE) .
	$(PIP) wheel -q --no-deps --no-cache-dir -w $(PACKAGE)/built $(PACKAGE)/*.tar.gz
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libtorch_cpu.so --exclude libtorch_cuda.so \
	  --exclude libc10.so -w $(PACKAGE) $(PACKAGE)/built/*.whl
	$(PYTHON) -m venv $(PACKAGE)/venv
	$(call install_torch,$(PACKAGE)/venv/bin/python)
	$(PACKAGE)/venv/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt $(PACKAGE)/*.whl
	cd $(PACKAGE)/empty && ../venv/bin/vlmteacher demo && ../venv/bin/python -c \
	  "from vlmteacher.environment import report; cpu = report()['backends']['cpu']; assert cpu['available'], cpu"

# At least 10,000 damaged inputs, new ones each time, for everything that reads input of a user or a hub; prints their
# number. `make fuzz ATHERIS=1`, or `make fuzz-atheris`: five minutes guided by coverage.
fuzz: .venv/installed-dev $(if $(ATHERIS),fuzz-atheris)
	rm -f build/fuzz.jsonl && mkdir -p build
	FUZZ_EXAMPLES=1000 VLMTEACHER_TRUST_REPORT=build/fuzz.jsonl $(PYTEST) tests/trust/test_fuzz.py
	$(BIN)/python -m tests.trust.report build/fuzz.jsonl

fuzz-atheris: .venv/installed-dev
	$(BIN)/python -m tests.trust.coverage_guided 300 build/fuzz-atheris

# 1,000 instances in one process; fails where memory grows by 1%.
soak: .venv/installed-dev
	$(BIN)/python -W ignore -m tests.trust.soak 1000

clean:
	rm -rf .venv build *.egg-info vlmteacher/_C.*.so vlmteacher/_cuda.so vlmteacher/_build.json

# Torch first: plain `torch` is a CUDA build of several gigabytes on most machines. Without an NVIDIA GPU the CPU build is
# requested by its full version; the plain name is the fallback where there is none. $(1): the Python to install it for.
define install_torch
if nvidia-smi >/dev/null 2>&1; then \
  $(1) -m pip --disable-pip-version-check install -q $(TORCH); \
else \
  $(1) -m pip --disable-pip-version-check install -q --no-deps --retries 1 --timeout 30 --extra-index-url $(CPU_INDEX) $(TORCH)+cpu \
  || $(1) -m pip --disable-pip-version-check install -q $(TORCH); \
fi
endef

.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(call install_torch,$(BIN)/python)
	touch $@

.venv/installed: .venv/torch $(BUILD)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@
