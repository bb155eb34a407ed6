# Every target makes the virtual environment it needs and reuses it while pyproject.toml is unchanged.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv/$(notdir $(PYTHON))
BIN := $(VENV)/bin
EXTRAS := demo test notebooks dev

.PHONY: help demo test check format notebooks clean
.DEFAULT_GOAL := help

help:  ## Explain each target
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train a network on handwritten digits; figures, metrics, checkpoint in demo-output/
	$(BIN)/python -m rmsprop_jax.demo $(ARGS)

test: $(VENV)/.test  ## Run the test suite and the doctests (ARGS="-k name" for a part)
	$(BIN)/python -m pytest -n auto $(ARGS)

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

clean:  ## Remove environments, caches and built files
	rm -rf .venv build dist demo-output .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11 or newer: choose one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
