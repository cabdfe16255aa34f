# Everything runs in one virtual environment that is made on first use: Python 3.11 or later and make are all it
# takes. `make` alone lists the targets.

comma := ,
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?=
PIP_VERSION ?=
JOBS ?= 2
TESTS ?=
ARGS ?=

# Tests that start the whole program, or servers that are killed under it, take three quarters of the time: `make system`.
# All others are `make test`.
SYSTEM := tests/end_to_end tests/crash tests/soak tests/fleet
# They compare processor time, which is only comparable where nothing else runs beside it.
ALONE := tests/end_to_end/test_busy_bodies.py tests/unit/test_usage_cost.py
# Some of their tests have the mark `server`.
SERVERS := tests/contract/test_nats_backend.py tests/contract/test_nats_logins.py tests/unit/test_delivery_lanes.py

# Packages are installed at the versions and hashes of requirements/*.lock. A stamp in the environment remembers
# that it was done, so a second `make` starts at once and works without a network. The locks are complete, so nothing
# is to be resolved (--no-deps): pip before 23.3 would look for the newest release of a package whose extra another
# one asks for, and then miss its hash.
RUN := $(VENV)/.stamp-run
TEST := $(VENV)/.stamp-test
BENCH := $(VENV)/.stamp-bench
LOCKED := install --quiet --quiet --no-deps --require-hashes -r
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The CEL library has no wheels for musl (Alpine): all but meters with an expression works without it.
MUSL := $(wildcard /lib/ld-musl-*)
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header

# Tests and the demo talk to this machine only, whatever proxy is set for the rest of the world.
export NO_PROXY := $(if $(NO_PROXY),$(NO_PROXY)$(comma))127.0.0.1,localhost,::1
export no_proxy := $(NO_PROXY)

.DEFAULT_GOAL := help
.PHONY: help demo run test system lint format fuzz crash soak bench lock installs site sbom readme man manifests screenshots prices clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(RUN) ## see it work: scripted model APIs, the sidecar, a usage table; no account, no key
	@$(BIN)/metering-sidecar demo $(ARGS)

run: $(RUN) ## serve for real: make run UPSTREAM=https://api.example.com
	@test -n "$(UPSTREAM)$$SIDECAR_UPSTREAM_URL" || { \
		echo 'say which API to forward to: make run UPSTREAM=https://api.example.com' >&2; exit 2; }
	@$(if $(UPSTREAM),SIDECAR_UPSTREAM_URL='$(UPSTREAM)') exec $(BIN)/metering-sidecar serve $(ARGS)

PYTEST := $(BIN)/python -m pytest -q -m 'not soak and not long'

test: $(TEST) ## all tests but those of the whole program (TESTS=tests/unit for a part, ARGS=-x for pytest's own options)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-10} $(PYTEST) -n $(JOBS) $(ARGS) \
		$(if $(TESTS),$(TESTS),-m 'not soak and not long and not server' tests $(addprefix --ignore=,$(SYSTEM) $(ALONE)))

system: $(TEST) ## the whole program as processes, and fleets: end to end, killed and faulted; half an hour
	@status=0; \
	$(PYTEST) -n $(JOBS) $(ARGS) $(SYSTEM) $(addprefix --ignore=,$(ALONE)) || status=$$?; \
	$(PYTEST) -n $(JOBS) $(ARGS) -m server $(SERVERS) || status=$$?; \
	$(PYTEST) -n 0 $(ARGS) $(ALONE) || status=$$?; \
	exit $$status

lint: $(TEST) ## ruff, its format, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(TEST) ## let ruff put imports, simple faults and the layout right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(TEST) ## the readers and decoders against random bytes, for longer than in `make test`
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-20000} \
		$(BIN)/python -m pytest -q -n $(JOBS) --timeout 3600 -k fuzz $(ARGS) $(or $(TESTS),tests)
	@$(PIP) install --quiet --quiet '.[fuzz]' && $(PIP) install --quiet --no-deps --no-build-isolation --editable . && \
		$(BIN)/python tests/fuzz_usage.py -max_total_time=$${FUZZ_SECONDS:-600} || \
		{ $(BIN)/python -c 'import atheris' 2>/dev/null && exit 1; echo 'atheris does not install here: left out'; }

crash: $(TEST) ## 1,000 rounds of deaths and faults under load, and every fail point; prints its figures
	CRASH_ROUNDS=$${CRASH_ROUNDS:-1000} $(BIN)/python -m pytest -q -n $(JOBS) --timeout 86400 -rP --show-capture=stdout \
		$(ARGS) tests/crash

soak: $(TEST) ## minutes of load with a backend that is down, and a million records pending; prints its figures
	$(BIN)/python -m pytest -q -s -m soak --timeout 7200 $(ARGS) $(or $(TESTS),tests)

bench: $(BENCH) ## cost per call and per chunk, beside nginx, HAProxy and Envoy where they are installed
	$(BIN)/python tests/bench $(ARGS)

lock: $(BIN)/python ## make the lock files anew from pyproject.toml
	$(PIP) install --quiet uv
	$(COMPILE) pyproject.toml requirements/build.in -c requirements/constraints.in -o requirements/run.lock
	$(COMPILE) pyproject.toml requirements/build.in -c requirements/run.lock --extra test --extra lint --extra clients \
		-o requirements/test.lock
	$(COMPILE) requirements/fleet.in -c requirements/test.lock -o requirements/fleet.lock

# The pip that each Python from 3.11 on brought along at its oldest and newest, and the newest of all.
PIPS ?= 22.3.1 23.0.1 23.2.1 24.2 newest
installs: $(TEST) ## the locks install with every pip that a Python may bring along (PIPS=…); wheel, archive and some tests run on every Python
	@for pip in $(PIPS); do \
		venv=$(VENV)-pip-$$pip; rm -rf $$venv; \
		$(MAKE) --no-print-directory VENV=$$venv PIP_VERSION=$$pip $$venv/.stamp-test && \
		$$venv/bin/python -m pip --version | cut -d ' ' -f 1-2 && $$venv/bin/python -m pip check && \
		$$venv/bin/metering-sidecar --help >/dev/null || exit 1; \
		rm -rf $$venv; \
	done
	$(BIN)/python tests/installed.py

site: $(TEST) ## the pages as a site, in build/site
	@$(BIN)/python tests/site_pages.py
	@test -x $(VENV)-docs/bin/zensical || { $(BIN)/python -m venv $(VENV)-docs && \
		$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet 'zensical>=0.0.70'; }
	$(VENV)-docs/bin/zensical build --clean --config-file mkdocs.yml

# Of what the image has, read from an environment that is made as the Dockerfile makes it.
sbom: $(TEST) ## what the image holds, as dist/sbom.cdx.json (CycloneDX)
	@rm -rf $(VENV)-image && $(BIN)/python -m venv $(VENV)-image
	@$(VENV)-image/bin/python -m pip --disable-pip-version-check $(LOCKED) requirements/run.lock -r requirements/fleet.lock
	@$(VENV)-image/bin/python -m pip --disable-pip-version-check install --quiet --quiet --no-deps --no-build-isolation .
	@$(VENV)-image/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes \
		hatchling editables packaging pathspec pluggy tomlkit trove-classifiers setuptools pip
	@test -x $(VENV)-release/bin/cyclonedx-py || { $(BIN)/python -m venv $(VENV)-release && \
		$(VENV)-release/bin/python -m pip --disable-pip-version-check install --quiet 'cyclonedx-bom>=7'; }
	@mkdir -p dist
	$(VENV)-release/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
		--output-reproducible --output-file dist/sbom.cdx.json $(VENV)-image/bin/python
	@rm -rf $(VENV)-image

readme: $(TEST) ## write the tables of the README from the code
	$(BIN)/python tests/readme_tables.py

man: $(TEST) ## write the man page from the parser
	$(BIN)/python tests/man_page.py

manifests: $(TEST) ## write the rules and dashboards for the Prometheus Operator from config/
	$(BIN)/python tests/manifests.py

screenshots: $(TEST) ## take the README's pictures of the page anew; needs chromium
	PYTHONPATH=.:tests $(BIN)/python tests/screenshots.py

prices: $(TEST) ## make the table of prices in the wheel anew from the genai-prices that is installed
	$(BIN)/python -m sidecar.prices.convert

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) $(VENV)-pip-* $(VENV)-image $(VENV)-release $(VENV)-docs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis demo-data

$(RUN): requirements/run.lock pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) (once) …"
	@sed $(if $(MUSL),'/^common-expression-language==/$(comma)/[^\\]$$/d',-n p) requirements/run.lock >$(VENV)/run.lock
	@$(PIP) $(LOCKED) $(VENV)/run.lock
	@$(PIP) install --quiet --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(TEST): requirements/test.lock $(RUN)
	@echo "installing the test tools into $(VENV) (once) …"
	@$(PIP) $(LOCKED) requirements/test.lock
	@touch $@

$(BENCH): $(TEST)
	@$(PIP) install --quiet --quiet '.[bench]' || echo 'some peers cannot be installed here: the bench goes on without them'
	@$(PIP) install --quiet --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# PIP_VERSION puts another pip in place of the one that the Python came with.
SET_PIP := $(if $(PIP_VERSION),$(PIP) install --quiet --quiet $(if $(filter newest,$(PIP_VERSION)),--upgrade pip,pip==$(PIP_VERSION)),true)

# A `python3.12` on the path may be an empty shell (version managers leave such), and a Python may come without
# `venv`: each candidate is tried by using it.
$(BIN)/python:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python; do \
		"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		echo "making $(VENV) with $$("$$python" -V)"; \
		"$$python" -m venv $(VENV) && $(SET_PIP) && exit 0; \
		rm -rf $(VENV); \
	done; \
	echo 'no Python 3.11 or later with the venv module was found; install one (Debian: python3 python3-venv)' >&2; \
	echo 'or name it: make PYTHON=/path/to/python3.12 …' >&2; exit 1
