# Everything happens in .venv, with the packages of constraints.txt. What is up to date is not done again.
#   make demo       two ranks train on handwritten digits        make test ARGS="-k tcp"   the tests, or some of them
#   make bench      the benchmarks                               make lint                 ruff
#   make sanitize   fleetcore's tests under address and undefined behaviour sanitizers     make clean

PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
INSTALLED := .venv/.installed
BUILT := .venv/.built
# Folders too: their time changes when a source is removed.
SOURCES := $(shell find fleetcore -type d -not -name __pycache__ -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h')
SANITIZED := $(CURDIR)/build-sanitize/lib

.PHONY: demo test bench lint sanitize clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	.venv/bin/pyfleet-launch --nproc 2 -m pyfleet.examples.digits $(ARGS)

test: $(BUILT)
	$(PY) -m pytest $(ARGS)

bench: $(BUILT)
	$(PY) -m pytest bench $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check

# Installing builds as well; without build isolation, so that this build and every later one use the same pinned Cython.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	rm -rf build $(BUILT)
	find fleetcore \( -name '*.so' -o -name '*.c' \) -delete
	$(PY) -m pip install -c constraints.txt setuptools cython
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@ $(BUILT)

$(BUILT): $(SOURCES) | $(INSTALLED)
	@for built in $$(find fleetcore -name '*.so' -o -name '*.c'); do test -e "$${built%%.*}.pyx" || rm -v "$$built"; done
	$(PY) setup.py build_ext --inplace
	touch $@

# Leaks are CPython's own at exit. libstdc++ has to be there before the sanitizer looks for its exceptions (torch throws).
sanitize: $(INSTALLED)
	rm -rf build-sanitize
	FLEETCORE_SANITIZE=1 $(PY) setup.py -q build --build-base build-sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED) && env PYTHONPATH=$(SANITIZED):$(CURDIR) PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  sh -c '$(CURDIR)/$(PY) -c "import fleetcore; assert fleetcore.__file__.startswith(\"$(SANITIZED)\")" && \
	    $(CURDIR)/$(PY) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider --capture=sys $(CURDIR)/tests/fleetcore $(ARGS)'

clean:
	rm -rf build build-sanitize dist *.egg-info $(BUILT) .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fleetcore \( -name '*.so' -o -name '*.c' \) -delete
	find fleetcore pyfleet tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
