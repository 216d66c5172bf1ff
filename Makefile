# `make run` and `make test` are all that a newcomer needs: git, make and Python 3.11 or newer with venv and pip.
# The first call makes .venv with the versions of constraints.txt; later calls go straight to work.
# Options: PYTHON=python3.13 (the interpreter of a new .venv), ARGS="..." (handed on to the command).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: help run test test-slow lint format types docs constraints clean

help:
	@echo "make run          train and sample the digits experiment into runs/digits"
	@echo "make test         run the quick tests: everything but what trains, kills or starts processes"
	@echo "make test-slow    run the other tests"
	@echo "make lint         ruff, as continuous integration runs it"
	@echo "make format       ruff's formatter"
	@echo "make types        pyright"
	@echo "make docs         build the documentation into docs/_build/html"
	@echo "make constraints  resolve constraints.txt afresh"
	@echo "make clean        remove .venv and all caches"

run: $(VENV)/.installed-experiments
	$(BIN)/python -m experiments.digits --out runs/digits $(ARGS)

# Two processes, whole files each: within a file tests share what they compile.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/.installed-ruff
	$(BIN)/ruff check .

format: $(VENV)/.installed-ruff
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# All but those that no command here installs: wandb, and flow-matching, which one benchmark needs and whose torch is by default
# a CUDA build of several GB, of many packages.
CONSTRAINED := experiments plots test docs ott grain tensorboard dev

# No hashes: pip refuses them beside a project that is installed from a directory, constrained or not.
constraints: $(VENV)/.made
	$(PIP_INSTALL) uv
	echo '# Versions that are tried together, for Python 3.11 and newer; made by: make constraints' > $(VENV)/constraints
	$(BIN)/uv pip compile --universal --python-version 3.11 $(CONSTRAINED:%=--extra %) --upgrade --no-header \
	  --no-annotate --no-config --quiet pyproject.toml >> $(VENV)/constraints
	mv $(VENV)/constraints constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-newest .pytest_cache .ruff_cache .hypothesis docs/_build build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so that an interrupted installation starts again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "jflow needs Python 3.11 or newer, and PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)" >&2; \
	  echo "Name another interpreter, for instance: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-experiments: $(VENV)/.made $(INPUTS)
	$(PIP_INSTALL) --editable '.[experiments]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made $(INPUTS)
	$(PIP_INSTALL) --editable '.[experiments,test]'
	@touch $@ $(VENV)/.installed-experiments

$(VENV)/.installed-ruff: $(VENV)/.made $(INPUTS)
	$(PIP_INSTALL) ruff
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(INPUTS)
	$(PIP_INSTALL) --editable '.[experiments,test,dev]'
	@touch $@ $(VENV)/.installed-ruff

$(VENV)/.installed-docs: $(VENV)/.made $(INPUTS)
	$(PIP_INSTALL) --editable '.[experiments,docs]'
	@touch $@
