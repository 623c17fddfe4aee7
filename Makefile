# The one door to every tool of the project.  Needs python3 (3.11 or newer), make and git; all
# else is set up here, in .venv, by the first target that needs it.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# What to serve, and further options for it: make serve IMAGE=disk.qcow2 SERVE_ARGS='-p 10810'
export IMAGE ?= demo.qcow2
SERVE_ARGS ?=
# make test PYTEST_ARGS='-k handshake -n 0'
PYTEST_ARGS ?=
# make crash CRASH_ARGS='--seed 7 --states 20000'
CRASH_ARGS ?=
# make bench BENCH_ARGS='--quick --only randread-32'
BENCH_ARGS ?=
# make fuzz FUZZ_ARGS='--target handshake --runs 1000000 --seed 1'
FUZZ_ARGS ?=
# make races RACES_ARGS='--seconds 60 --seed 7'
RACES_ARGS ?=
# make kernel KERNEL=linux-image-6.12.95+deb12-cloud-amd64: another kernel package than the default
KERNEL ?=

# As many tests at once as there are processors, but for those that measure time.
PYTEST := $(BIN)/python -m pytest -n auto --dist=loadgroup

.PHONY: help serve test matrix races faults limits fuzz refusals crash kernel check lint types
.PHONY: coverage bench cache-table clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' Makefile | expand -t 18

serve: $(VENV)/.has-run $(if $(filter demo.qcow2,$(IMAGE)),demo.qcow2)  ## serve IMAGE=path, or a 1 GiB image of its own
	@exec $(BIN)/nbdserve serve $(SERVE_ARGS) -- "$$IMAGE"

demo.qcow2: | $(VENV)/.has-run
	@$(BIN)/nbdserve create $@ 1G

test: $(VENV)/.has-test  ## set up everything, the peers included, and run the tests
	@tools/peers.sh
	$(PYTEST) $(PYTEST_ARGS)

matrix: $(VENV)/.has-test  ## all that moves data, with every I/O engine and each cache mode it may have
	@tools/peers.sh
	$(PYTEST) --matrix tests/interop $(PYTEST_ARGS)

races: $(VENV)/.has-test  ## interleavings of what races, for ten minutes; prints how many, and the seeds
	PYTHONPATH=tests $(BIN)/python -m races $(RACES_ARGS)

kernel: $(VENV)/.has-test  ## all with a real kernel as the client; NBDSERVE_SOAK=1 for the long run
	@tools/peers.sh
	kernel=$$(tools/guest-kernel.sh $(KERNEL)) && \
	NBDSERVE_KERNEL=$$(basename $$kernel) \
		$(BIN)/python -m pytest --matrix --durations=10 tests/kernel $(PYTEST_ARGS)

fuzz: $(VENV)/.has-fuzz  ## mutated bytes for whatever reads a stranger's, guided by coverage
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ_ARGS)

refusals: $(VENV)/.has-test  ## what it costs to refuse each damaged image: a table
	PYTHONPATH=tests $(BIN)/python -m fuzz.damages

crash: $(VENV)/.has-test  ## crashes of the qcow2 node, many; CRASH_ARGS='--seed 7 --states 20000'
	@tools/peers.sh
	PYTHONPATH=tests $(BIN)/python -m crash $(CRASH_ARGS)

faults: $(VENV)/.has-test  ## every operation on an image's files fails in every way; says how many did
	NBDSERVE_SOAK=1 $(BIN)/python -m pytest --durations=10 tests/faults $(PYTEST_ARGS)

check: $(VENV)/.has-dev  ## ruff, mypy --strict and the tests
	@$(MAKE) --no-print-directory lint types test

lint: $(VENV)/.has-dev
	$(BIN)/ruff check .

types: $(VENV)/.has-dev
	$(BIN)/mypy

coverage: $(VENV)/.has-test  ## run the tests and say which lines and branches they missed
	@tools/peers.sh
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --ignore=tests/kernel $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(VENV)/.has-run  ## compare with qemu-nbd and nbdkit; a table here, JSON in build/bench.json
	@tools/peers.sh
	PYTHONPATH=tests $(BIN)/python -m bench $(BENCH_ARGS)

limits: $(VENV)/.has-test  ## a thousand silent, slow and flooding clients: what they cost, as a table
	@tools/peers.sh
	PYTHONPATH=tests $(BIN)/python -m limits

cache-table: $(VENV)/.has-test  ## observe what each cache mode calls, and write it into docs/caching.md
	@tools/peers.sh
	PYTHONPATH=tests $(BIN)/python -m interop.cache_modes

clean:  ## remove what was made here, the demo image too
	rm -rf $(VENV) build dist *.egg-info demo.qcow2 htmlcov .coverage .coverage.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: the environment holds the package (editable) with what that use needs.  They are made
# anew when the metadata changes.  dev and fuzz contain test contains run, so one install serves
# all below it.
INSTALLS := setup.cfg pyproject.toml tools/venv.sh

$(VENV)/.has-run: $(INSTALLS)
	@tools/venv.sh $(VENV)
	@echo 'Installing nbdserve into $(VENV)'
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.has-test: $(INSTALLS)
	@tools/venv.sh $(VENV)
	@echo 'Installing nbdserve and what its tests need into $(VENV)'
	@$(PIP_INSTALL) -e '.[test]'
	@touch $(VENV)/.has-run $@

$(VENV)/.has-dev: $(INSTALLS)
	@tools/venv.sh $(VENV)
	@echo 'Installing nbdserve, what its tests need, mypy and ruff into $(VENV)'
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.has-run $(VENV)/.has-test $@

$(VENV)/.has-fuzz: $(INSTALLS)
	@tools/venv.sh $(VENV)
	@echo 'Installing nbdserve and what fuzzes it into $(VENV)'
	@$(PIP_INSTALL) -e '.[fuzz]'
	@touch $(VENV)/.has-run $(VENV)/.has-test $@
