# Two commands work on a fresh machine with python3, a C compiler and make:
#
#   make demo     builds tstpool, then runs a server and clients of several kinds for a few seconds
#   make test     builds tstpool, then runs its tests
#
# PYTHON chooses the interpreter: `make test PYTHON=python3.13`. Each has a virtual environment of its own.
# ARGS is passed on: `make test ARGS="-k echo -x"`.
#
# How it is laid out, and why:
# - The environment holds an *editable* install: the extension is built in place, beside its sources, under a name that
#   holds the interpreter's ABI (_core.cpython-313t-x86_64-linux-gnu.so). So several interpreters share one tree, and
#   `import tstpool` finds the same package from any directory and from the root, where Python would otherwise
#   prefer an unbuilt source folder to an installed package. What a wheel holds is tests/test_packaging.py's business.
# - Other flavours of the build (debug, asan, tsan, cov, ...) would have that same file name. Each is made in a
#   copy of the tree, build/tree-FLAVOUR-VERSION, and tested there: see .ci/flavour.

PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d%s" % (*sys.version_info[:2], sys.abiflags))' 2>/dev/null)
INSTRUMENTED := $(findstring --with-thread-sanitizer,$(shell $(PYTHON) -c 'import sysconfig; \
    print(sysconfig.get_config_var("CONFIG_ARGS"))' 2>/dev/null))
ifneq ($(INSTRUMENTED),)
TAG := $(TAG)-tsan
endif
ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(TAG)
endif

BIN := $(VENV)/bin
BUILT := $(VENV)/.built
SOURCES := pyproject.toml setup.py $(wildcard tstpool/*.pyx tstpool/*.px[di] tests/*/*.pyx tests/simulation/*.[ch])

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Installs lists of requirements from pyproject.toml, where they are written once: $(call install_lists,requires|test).
# (Lists only: coverage has an option that is called "parallel", too.)
# --prefer-binary: where a free-threaded Python has no wheel yet, an older release rather than a build from source.
install_lists = sed -nE 's/^($(1)) = \[/[/p' pyproject.toml \
    | $(BIN)/python -c 'import ast, sys; print(*[r for line in sys.stdin for r in ast.literal_eval(line)], sep="\n")' \
    | $(PIP_INSTALL) --prefer-binary -r /dev/stdin

.PHONY: help build demo test test-slow model simulate faults parallel debug asan tsan cov fuzz lint format bench bench-full bench-results bench-check wheel clean distclean

help:
	@echo "make demo       run a server and clients of several kinds, check every byte"
	@echo "make test       build and run the tests (ARGS=... goes to pytest)"
	@echo "make test-slow  the tests that take minutes"
	@echo "make build      build only"
	@echo "make model      searches the models of the hand-over (needs spin)"
	@echo "make simulate   the engine over a fake kernel, 20,000 seeds (ARGS=\"--seed 7 --trace\" replays one)"
	@echo "make faults     each system call fails with each errno (needs strace); the table: build/fault-matrix.md"
	@echo "make parallel   the tests, each in four threads at the same time (for a free-threaded Python)"
	@echo "make debug      the tests with the engine's invariants checked"
	@echo "make asan       the tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make tsan       the tests under ThreadSanitizer (free-threaded: PYTHON= one built with --with-thread-sanitizer)"
	@echo "make fuzz       a minute of fuzzing for each target (ARGS=3600 for an hour each; best with clang)"
	@echo "make cov        the tests, counting which lines of the package they execute (needs gcov)"
	@echo "make lint       ruff, cython-lint, mypy, stubtest"
	@echo "make format     ruff's formatter over all Python files"
	@echo "make bench      the benchmarks, six minutes of them: table and chart in benchmarks/build"
	@echo "make bench-full all of them: an hour and a quarter"
	@echo "make bench-results  what benchmarks/RESULTS.md holds, half an hour: for a quiet machine, to be committed"
	@echo "make bench-check  has it become slower? four minutes; compares with benchmarks/baseline.json (ARGS=--store makes that)"
	@echo "make wheel      source distribution and wheel in dist/"
	@echo "make clean      remove what was built; make distclean: the virtual environments too"
	@echo "PYTHON=...      the interpreter to use (now: $(PYTHON), $(or $(TAG),which does not run))"

# EXTRAS: "lint cov", say, installs the tools of those targets too.
build: $(BUILT) $(EXTRAS:%=$(VENV)/.extra-%)

# pip builds without its usual throw-away environment (Cython goes into ours instead), so that a rebuild after a small
# change does not install Cython anew. It is quiet unless something fails: then it prints everything.
# A Python that was built with ThreadSanitizer is for `make tsan` alone, which builds for itself: an extension in place
# would have the name of an ordinary Python's. It says nothing of the races that it has in pip.
$(BUILT): export TSAN_OPTIONS := report_bugs=0
$(BUILT): $(if $(INSTRUMENTED),pyproject.toml,$(SOURCES))
	@sh .ci/prepare "$(PYTHON)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "building tstpool for Python $(TAG) in $(VENV)"
	@$(call install_lists,requires|test|cli)
	@$(if $(INSTRUMENTED),,TSTPOOL_WHITEBOX=1 $(PIP_INSTALL) --no-build-isolation --no-deps --editable .)
	@touch $@

demo: $(BUILT)
	$(BIN)/python -m tstpool demo $(ARGS)

test: $(BUILT)
	$(BIN)/pytest $(ARGS)

test-slow: $(BUILT)
	$(BIN)/pytest -m slow -o faulthandler_timeout=900 $(ARGS)

debug asan tsan: $(BUILT)
	bash .ci/flavour $@ $(VENV) $(ARGS)

cov: $(VENV)/.extra-cov
	bash .ci/flavour $@ $(VENV) $(ARGS)

# Guided by coverage where clang is there and atheris installs; inputs are changed at random elsewhere.
fuzz: $(BUILT)
	@$(call install_lists,fuzz) || echo "no atheris for this Python"
	bash .ci/flavour $@ $(VENV) $(ARGS)

model:
	$(PYTHON) tests/model/run.py $(ARGS)

simulate: $(BUILT)
	$(BIN)/python tests/simulation/run.py $(ARGS)

faults: $(BUILT)
	$(BIN)/python tests/fault_matrix/run.py $(ARGS)

# What can't run in several threads is left out: `make test` runs it. tests/thread_safety.py has the reasons. (Hypothesis
# only drives parts that no two threads share, and is slow in four.)
parallel: $(VENV)/.extra-parallel
	TSTPOOL_TEST_SCALE=$${TSTPOOL_TEST_SCALE:-0.3} TSTPOOL_TEST_PATIENCE=$${TSTPOOL_TEST_PATIENCE:-4} \
	    $(BIN)/pytest --parallel-threads=4 --skip-thread-unsafe=yes --mark-hypothesis-as-unsafe -rfE $(ARGS)

lint: $(VENV)/.extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint tstpool tests
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tstpool --allowlist tests/stubtest_allowlist.txt

format: $(VENV)/.extra-lint
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.extra-bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-full: $(VENV)/.bench-servers
	$(BIN)/python -m benchmarks --full $(ARGS)

# TSTPOOL_BENCH_FREE_THREADED=PYTHON, with a tstpool of its own: for the servers that need one without a GIL.
bench-results: $(VENV)/.bench-servers
	$(BIN)/python -m benchmarks --write-results $(ARGS)

bench-check: $(VENV)/.extra-bench
	$(BIN)/python -m benchmarks.check $(ARGS)

# One at a time: where one does not install (a free-threaded Python, say, for which it has no wheel) the others do.
$(VENV)/.bench-servers: $(VENV)/.extra-bench
	@sed -nE 's/^bench-servers = \[(.*)\].*/\1/p' pyproject.toml | tr -d '",' | xargs -n 1 \
	    $(PIP_INSTALL) --only-binary :all: || echo "what does not install is left out of the comparison"
	@touch $@

wheel: $(BUILT)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -c "import setuptools.build_meta as b; b.build_sdist('dist')"

# Tools that only some targets need: one extra of pyproject.toml each.
$(VENV)/.extra-%: $(BUILT)
	@$(call install_lists,$*)
	@touch $@

clean:
	rm -rf build dist *.egg-info tstpool/*.so tests/*/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f .venv*/.built

distclean: clean
	rm -rf .venv .venv-*
