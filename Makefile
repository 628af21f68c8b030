# Needs make and Python 3.11 or newer; everything else is installed once, outside the clone, on first use.
#
# The environment holds the versions of requirements.lock. It lies in a cache folder under a name that hashes that file and
# Python's version, so that changed requirements make a new one and clones share one. It is built under a temporary name,
# and the final name is a link set last: an interrupted install is never used. The code itself runs from the clone.

PYTHON ?= python3
ARGS ?=
PACKAGES := carray jobs tests
BENCHES := cars search search.gpu classify classify.decode classify.listing evaluate query scale estimate
# One process of tests per core; all tests that share the run's Ray are in the same one (tests/conftest.py).
PARALLEL := -n logical --maxprocesses 4

LOCK ?= requirements.lock
HASH := $(PYTHON) -c 'import hashlib, sys; \
	print(hashlib.sha256(open("$(LOCK)", "rb").read() + sys.version.encode()).hexdigest()[:12])'
# The cache folder, or .venv in the clone where the cache may not be written.
FIND_VENV := for place in "$${XDG_CACHE_HOME:-$$HOME/.cache}/carray" "$(CURDIR)/.venv"; do \
	if mkdir -p "$$place" 2>/dev/null && test -w "$$place"; then \
		echo "$$place/venv-$$($(HASH))"; break; fi; done
# Found once, when a target first needs it; `make help` needs no Python.
VENV ?= $(eval VENV := $(shell $(FIND_VENV)))$(VENV)
RUN = PYTHONPATH="$(CURDIR)" "$(VENV)/bin/python"

.DEFAULT_GOAL := help
.PHONY: help demo test test-all simulate test-cluster test-lowest check lock bench format wheel venv clean python

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="..." is handed on; VENV=DIR uses an environment of yours, PYTHON=python3.12 another Python'

demo: venv ## Search, pack and classify end to end on generated vehicles, in a few minutes
	@$(RUN) -m carray demo $(ARGS)

test: venv ## Run the tests except the slow ones (they start a real object store and a real Ray on this machine)
	@$(RUN) -m pytest $(PARALLEL) -m "not slow" $(ARGS)

test-all: venv ## Run the tests, the slow ones too
	@$(RUN) -m pytest $(PARALLEL) $(ARGS)

simulate: venv ## Run 20,000 schedules of faults against the classification protocol (a quarter of an hour)
	@CARRAY_SCHEDULES=20000 $(RUN) -m pytest $(PARALLEL) --dist worksteal --timeout 3600 tests/classify/test_simulation.py $(ARGS)

test-cluster: venv ## Run both jobs on three hosts in network namespaces, and lose some of them (Linux, root; twelve minutes)
	@CARRAY_TEST_CLUSTER=1 $(RUN) -m pytest tests/several_hosts $(ARGS)

check: venv ## Lint, formatting, types, the house rules and known vulnerabilities; changes nothing
	$(RUN) -m ruff check $(PACKAGES)
	$(RUN) -m ruff format --check $(PACKAGES)
	$(RUN) -m mypy carray jobs
	$(RUN) -m pytest -q tests/test_architecture.py
	@$(RUN) jobs/audit.py

lock: venv ## Resolve the newest versions that pyproject.toml allows into requirements.lock
	@"$(VENV)/bin/uv" pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
		--custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links --upgrade \
		--output-file requirements.lock pyproject.toml

# Not part of .ci/run: it installs a second environment, and only a change of a bound changes its outcome.
test-lowest: venv ## Run the tests with the oldest versions that pyproject.toml allows (installs another 7 GB, once)
	@mkdir -p build && "$(VENV)/bin/uv" pip compile --quiet --resolution lowest-direct --all-extras --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --python "$(PYTHON)" --output-file build/lowest.lock pyproject.toml
	@$(MAKE) --no-print-directory test LOCK=build/lowest.lock

format: venv ## Format the code and mend what the linter can
	$(RUN) -m ruff check --fix $(PACKAGES)
	$(RUN) -m ruff format $(PACKAGES)

bench: venv ## Run every benchmark in jobs/ that this machine can; each appends to results/
	@failed=; for job in $(BENCHES); do \
		echo "== $$job"; $(RUN) -m "jobs.bench.$$job" $(ARGS) || failed="$$failed $$job"; \
	done; test -z "$$failed" || { echo "Did not run:$$failed" >&2; exit 1; }

wheel: venv ## Build the wheel that a cluster can install, into dist/
	@$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist . && rm -rf build carray.egg-info && ls dist/*.whl

venv: python ## Make the environment, if it is not there yet, and print its place
	@test -x "$(VENV)/bin/python" || { \
		made="$(VENV).$$$$"; trap 'rm -rf "$$made"' EXIT; trap 'exit 1' HUP INT TERM; \
		echo "Installing what carray needs into $(VENV) (once; 7 GB, some minutes)"; \
		mkdir -p "$$(dirname "$(VENV)")" && $(PYTHON) -m venv "$$made" && \
		"$$made/bin/python" -m pip install --quiet --disable-pip-version-check -r $(LOCK) && \
		{ ln -s "$$(basename "$$made")" "$(VENV)" 2>/dev/null || test -x "$(VENV)/bin/python"; } && \
		if test "$$(readlink "$(VENV)")" = "$$(basename "$$made")"; then trap - EXIT; fi; }
	@test "$(MAKECMDGOALS)" != venv || echo "$(VENV)"

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "carray needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); say for example make PYTHON=python3.12." >&2; \
		exit 1; }

clean: ## Remove caches and build outputs from the clone; environments in the cache stay
	rm -rf build dist carray.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(PACKAGES) -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
