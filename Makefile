# Set-up, checks and the demo. Override on the command line: PYTHON=python3.12, CONSTRAINTS= (newest versions).
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
UNDER := $(addprefix -c ,$(CONSTRAINTS))
# A process for each core takes one file of tests after the other. One thread each: most models here are tiny.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
NATIVE := $(wildcard csrc/*/*.cpp csrc/include/*/*.h csrc/*/*.h)

.PHONY: help demo test test-long sanitize lint clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## +/make \1: /p' Makefile

demo: $(VENV)/demo.stamp  ## install, then run a small reasoning model over a range of thinking budgets
	$(BIN)/python -m s1engine.train.tiny.demo

test: lint  ## install, lint, type-check, then every test but the slow ones
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton

test-long: lint  ## the same with the slow tests; S1ENGINE_TEST_DATA names the folder of evaluation data
	$(PYTEST) -m ""
	TRITON_INTERPRET=1 $(PYTEST) -m "" tests/triton

# AddressSanitizer and UBSan in a build of its own; their runtime has to be loaded before python's own memory is.
sanitize: $(VENV)/dev.stamp  ## the C++ operators under AddressSanitizer and UBSan
	S1ENGINE_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1" \
		$(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 S1ENGINE_OPS=$$(ls build/sanitize/s1engine/_ops*.so) \
		$(BIN)/python -m pytest tests/csrc

# mypy sees `kernels`, `train` and `bench` under `s1engine` through links, as an installed wheel has them.
lint: $(VENV)/dev.stamp  ## ruff and mypy
	$(BIN)/ruff check .
	rm -rf build/typecheck && mkdir -p build/typecheck/s1engine
	cd build/typecheck/s1engine && ln -s ../../../s1engine/* ../../../kernels ../../../train ../../../bench .
	$(BIN)/mypy

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build s1engine.egg-info s1engine/_native*.so s1engine/_ops*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that what follows meets its version as settled. The old library goes before the build:
# a failed build must not leave a stale one in its place.
$(VENV)/%.stamp: setup.py pyproject.toml $(CONSTRAINTS) $(NATIVE) | $(BIN)/python
	$(PIP) install $(UNDER) torch setuptools
	rm -f s1engine/_native*.so s1engine/_ops*.so
	$(PIP) install $(UNDER) --no-build-isolation -e '.[$*]'
	@ls s1engine/_native*.so s1engine/_ops*.so >/dev/null 2>&1 || \
		echo "note: a native CPU library was not built (is there a C++ compiler?); slower Python code serves instead"
	touch $@
