# Every target makes the virtual environment it needs and reuses it while pyproject.toml is unchanged.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv/$(notdir $(PYTHON))
BIN := $(VENV)/bin
EXTRAS := demo test notebooks dev

# The frameworks that the dialects are compared with, each with its own environment.
FRAMEWORKS ?= torch tensorflow paddle mxnet1 mxnet2
FRAMEWORK_VENVS := .venv/frameworks-$(notdir $(PYTHON))
PARITY := $(CURDIR)/build/parity
RECORD = cd tests && PYTHONDONTWRITEBYTECODE=1 TF_CPP_MIN_LOG_LEVEL=3

.PHONY: help demo test slow check format notebooks golden parity clean
.DEFAULT_GOAL := help

help:  ## Explain each target
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train a network on handwritten digits into demo-output/ (ARGS="--resume" and others)
	$(BIN)/python -m rmsprop_jax.demo $(or $(ARGS),--overwrite)

test: $(VENV)/.test  ## Run the test suite and the doctests (ARGS="-k name" for a part)
	$(BIN)/python -m pytest -n auto -m 'not slow' $(ARGS)

slow: $(VENV)/.test  ## Run the tests that take more than half a minute each
	$(BIN)/python -m pytest -n auto -m slow $(ARGS)

check: $(VENV)/.dev  ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## Format the sources and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.notebooks  ## Build the notebooks from their sources and run them
	rm -rf build/notebooks && mkdir -p build/notebooks
	for source in notebooks/*.py; do \
	  $(BIN)/jupytext --quiet --output "build/notebooks/$$(basename "$$source" .py).ipynb" "$$source"; \
	done
	$(BIN)/python -m pytest -p no:cacheprovider --nbmake --overwrite --nbmake-timeout=300 build/notebooks

golden: $(FRAMEWORKS:%=$(FRAMEWORK_VENVS)/%/.installed)  ## Record the frameworks' traces in tests/golden/ anew
	set -e; for name in $(FRAMEWORKS); do (\
	  $(RECORD) $(CURDIR)/$(FRAMEWORK_VENVS)/$$name/bin/python -m golden.record_$$name golden/$$name.npz); \
	done

parity: $(VENV)/.test $(FRAMEWORKS:%=$(FRAMEWORK_VENVS)/%/.installed)  ## Replay drawn configurations in the frameworks and compare
	rm -rf $(PARITY) && mkdir -p $(PARITY)
	cd tests && $(CURDIR)/$(BIN)/python -m parity.draw $(PARITY)/configurations.json
	set -e; for name in $(FRAMEWORKS); do (\
	  $(RECORD) $(CURDIR)/$(FRAMEWORK_VENVS)/$$name/bin/python -m golden.record_$$name \
	    $(PARITY)/$$name.npz $(PARITY)/configurations.json); \
	done
	cd tests && $(CURDIR)/$(BIN)/python -m parity.compare $(FRAMEWORKS:%=$(PARITY)/%.npz)

clean:  ## Remove environments, caches and built files
	rm -rf .venv build dist demo-output .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11 or newer: choose one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# Their requirements are complete, so that pip need not resolve and brings nothing along.
$(FRAMEWORK_VENVS)/%/.installed: tests/golden/requirements/%.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -r $<
	@touch $@
