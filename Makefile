# Every target makes the virtual environment it needs and reuses it while pyproject.toml is unchanged.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv/$(notdir $(PYTHON))
BIN := $(VENV)/bin
EXTRAS := demo test notebooks dev bench build fuzz mutation

# What one test has compiled serves the others, and the next run.
CACHING = JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# The compilers for TPU and GPU are kept apart: they slow down every import of jax.
AOT_VENV := .venv/aot-$(notdir $(PYTHON))

DOCS_VENV := .venv/docs-$(notdir $(PYTHON))

# The frameworks that the dialects are compared with, each with its own environment.
FRAMEWORKS ?= $(basename $(notdir $(wildcard tests/golden/requirements/*.txt)))
FRAMEWORK_VENVS := .venv/frameworks-$(notdir $(PYTHON))
FRAMEWORKS_INSTALLED := $(FRAMEWORKS:%=$(FRAMEWORK_VENVS)/%/.installed)
# Those that checkpoints move to and from; Keras is installed where TensorFlow is.
MOVED := $(filter torch tensorflow,$(FRAMEWORKS)) $(if $(filter tensorflow,$(FRAMEWORKS)),keras)
PARITY := $(CURDIR)/build/parity
STUDY := build/storage-study
# Run a module of tests/ where a framework is: $(call in,torch) module. And where JAX is: $(HERE) module.
in = cd $(CURDIR)/tests && PYTHONDONTWRITEBYTECODE=1 TF_CPP_MIN_LOG_LEVEL=3 \
  $(CURDIR)/$(FRAMEWORK_VENVS)/$(1:keras=tensorflow)/bin/python -m
HERE = cd $(CURDIR)/tests && $(CURDIR)/$(BIN)/python -m

BENCH_TORCH = $(FRAMEWORK_VENVS)/torch

# The compiled step is a distribution of its own, so that nothing else needs a compiler.
FUSED := .venv/fused-$(notdir $(PYTHON))

.PHONY: help demo test test-all slow laws bench storage-study accelerator aot check format notebooks notebooks-write notebooks-prose docs golden parity fused bench-fused
.PHONY: coverage upstream dist released fuzz mutation clean
.DEFAULT_GOAL := help

help:  ## Explain each target
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train a network on handwritten digits into demo-output/ (ARGS="--resume" and others)
	$(BIN)/python -m rmsprop_jax.demo $(or $(ARGS),--overwrite)

test: $(VENV)/.test  ## See that each public function does what it says, in four minutes (ARGS="-k name" for a part)
	$(CACHING) $(BIN)/python -m pytest -n auto -m 'not extended and not slow' $(ARGS)

test-all: $(VENV)/.test  ## Run the whole suite, under all conditions, but for the slow tests
	$(CACHING) $(BIN)/python -m pytest -n auto -m 'not slow' $(ARGS)

coverage: $(VENV)/.test  ## Run the whole suite and say which lines and branches it does not reach
	$(BIN)/python -m coverage erase
	$(CACHING) $(BIN)/python -m coverage run -m pytest -n auto -m 'not slow' $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

slow: $(VENV)/.test  ## Run the tests that take more than half a minute each
	$(CACHING) $(BIN)/python -m pytest -n auto -m slow $(ARGS)
	LAWS=many $(CACHING) $(BIN)/python -m pytest -n auto tests/test_laws.py $(ARGS)

laws: $(VENV)/.test  ## Look for counterexamples of each law among new cases (CASES=2000)
	LAWS=new CASES=$(or $(CASES),2000) $(CACHING) $(BIN)/python -m pytest -n auto tests/test_laws.py $(ARGS)

bench: $(VENV)/.bench $(BENCH_TORCH)/.installed  ## Measure steps against Optax, PyTorch and Keras (ARGS="--help" for parts)
	$(BIN)/python -m benchmarks --torch-python $(CURDIR)/$(BENCH_TORCH)/bin/python $(ARGS)

# The JAX of that interpreter is the accelerator's, so nothing is installed.
accelerator:  ## Check and time a real accelerator with the JAX that PYTHON has (ARGS="--quick" to try it on a CPU)
	$(PYTHON) -m benchmarks.accelerator $(ARGS)

aot: $(AOT_VENV)/.installed  ## Compile for TPU and GPU, which need not be there, and look at the programs
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest -n auto tests/aot $(ARGS)

upstream: $(VENV)/.test  ## Say which faults of Optax still stand in the installed version (ARGS=--write for the page)
	cd tests && $(CACHING) JAX_PLATFORMS=cpu $(CURDIR)/$(BIN)/python -m upstream $(ARGS)

check: $(VENV)/.dev  ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## Format the sources and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.notebooks  ## See that notebooks and their sources are in step, and run the sources
	$(BIN)/python tests/notebook_pairs.py check
	$(execute_notebooks)

notebooks-write: $(VENV)/.notebooks  ## Run the sources and write the notebooks with their outputs (NOTEBOOKS=03_vision)
	$(execute_notebooks)
	$(BIN)/python tests/notebook_pairs.py write build/notebooks

notebooks-prose: $(VENV)/.notebooks  ## Bring prose of the sources into the notebooks, whose outputs stay
	$(foreach name,$(NOTEBOOKS),$(BIN)/jupytext --quiet --update --to ipynb --output notebooks/$(name).ipynb notebooks/sources/$(name).py &&) true
	$(BIN)/python tests/notebook_pairs.py write notebooks

NOTEBOOKS ?= $(basename $(notdir $(wildcard notebooks/sources/*.py)))
define execute_notebooks
rm -rf build/notebooks && mkdir -p build/notebooks && cp -R notebooks/data build/notebooks/
$(foreach name,$(NOTEBOOKS),$(BIN)/jupytext --quiet --output build/notebooks/$(name).ipynb notebooks/sources/$(name).py &&) true
$(BIN)/python -m pytest -p no:cacheprovider --nbmake --overwrite --nbmake-timeout=600 build/notebooks
endef

# The variable silences the theme's advertisement of its successor.
docs: $(DOCS_VENV)/.installed  ## Build the documentation into build/site/
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --config-file docs/site/mkdocs.yml

golden: $(VENV)/.test $(FRAMEWORKS_INSTALLED)  ## Record the frameworks' traces in tests/ anew
	$(foreach name,$(FRAMEWORKS),$(call record_trace,$(name),golden/$(name).npz))
	$(if $(filter torch,$(FRAMEWORKS)),$(call in,torch) golden.record_worked_example ../notebooks/data/worked_example.npz)
	$(if $(filter tensorflow,$(FRAMEWORKS)),$(call in,tensorflow) golden.record_embeddings golden/embeddings.json)
	$(foreach name,$(filter torch tensorflow,$(FRAMEWORKS)),$(call record_averages,$(name)))
	$(foreach name,$(filter torch keras,$(MOVED)),$(call record_schedules,$(name)))
	$(foreach name,$(MOVED),$(call record_run,$(name),interchange_data/$(name).npz))
	$(foreach name,$(filter torch tensorflow,$(FRAMEWORKS)),$(call record_identification,$(call in,$(name)),$(name)))
	$(call record_identification,$(HERE),optax)
	$(if $(filter torch,$(FRAMEWORKS)),$(call in,torch) interchange_data.record_groups interchange_data/groups.npz)
	$(if $(filter torch,$(FRAMEWORKS)),$(call in,torch) interchange_data.record_layers interchange_data/layers.npz)
	$(if $(filter torch,$(FRAMEWORKS)),$(call in,torch) interchange_data.record_files interchange_data/files)
	$(if $(filter tensorflow,$(FRAMEWORKS)),$(call in,tensorflow) interchange_data.record_saved interchange_data/saved.npz)
	$(foreach name,$(filter torch tensorflow,$(FRAMEWORKS)),$(call record_float64,$(name)))

parity: $(VENV)/.test $(FRAMEWORKS_INSTALLED)  ## Compare drawn configurations and moved checkpoints with the frameworks
	rm -rf $(PARITY) && mkdir -p $(PARITY)
	$(HERE) parity.draw $(PARITY)/configurations.json
	$(foreach name,$(FRAMEWORKS),$(call record_trace,$(name),$(PARITY)/$(name).npz $(PARITY)/configurations.json))
	$(HERE) parity.compare $(FRAMEWORKS:%=$(PARITY)/%.npz)
	$(foreach name,$(MOVED),$(call move_both_ways,$(name)))

# Each is one or more lines of a recipe, and so ends with an empty one.
define record_trace
$(call in,$1) golden.record_$1 $2

endef
define record_run
$(call in,$1) interchange_data.frameworks $1 $2

endef
define record_identification
$1 identify_data.record_$2

endef
define record_averages
$(call in,$1) golden.record_averages $1 golden/averages_$1.json

endef
define record_schedules
$(call in,$1) golden.record_schedules $1 golden/schedules_$1.json

endef
define record_float64
$(call in,$1) interchange_data.record_float64 $1 interchange_data/float64_$1.json

endef
define move_both_ways
$(HERE) interchange_data.check_live write $1 $(PARITY)/our-$1.npz
$(call record_run,$1,$(PARITY)/their-$1.npz $(PARITY)/our-$1.npz)
$(HERE) interchange_data.check_live compare $1 $(PARITY)/their-$1.npz

endef

# The peer, bitsandbytes, is in PyTorch's environment.
storage-study: $(VENV)/.demo $(FRAMEWORK_VENVS)/torch/.installed  ## Measure the storage formats into build/storage-study/
	set -e; for part in cost tracking training parameters steps; do $(BIN)/python -m benchmarks.storage.$$part $(STUDY); done
	$(FRAMEWORK_VENVS)/torch/bin/python benchmarks/storage/peer.py $(STUDY)
	$(BIN)/python -m benchmarks.storage.report $(STUDY)

fused: $(FUSED)/.installed  ## Build and test the compiled step for CPUs
	$(FUSED)/bin/python -P -m pytest -n auto -c fused_cpu/pyproject.toml --rootdir fused_cpu -p no:cacheprovider \
	  fused_cpu/tests --pyargs rmsprop_jax_fused

bench-fused: $(FUSED)/.installed  ## Time the compiled step for CPUs (ARGS as for bench)
	$(FUSED)/bin/python -m benchmarks --sections steps compilation --output build/bench-fused $(ARGS)

dist: $(VENV)/.build  ## Build the wheel and the source distribution into dist/
	rm -rf dist
	$(BIN)/python -m build

released: dist  ## Install the wheel into empty environments, with the newest and the oldest dependencies
	$(BIN)/python tests/released/install.py dist/*.whl build/released $(or $(PYTHONS),$(PYTHON))

fuzz: $(VENV)/.fuzz  ## Look for input that breaks the readers, for ten minutes (ARGS for libFuzzer; Python 3.11)
	mkdir -p build/fuzz && cd build/fuzz && JAX_PLATFORMS=cpu $(CURDIR)/$(BIN)/python \
	  $(CURDIR)/tests/fuzz/readers.py corpus $(or $(ARGS),-max_total_time=600 -max_len=2000)

mutation: $(VENV)/.mutation  ## Break mathematics and storage and see that tests notice (ARGS='*.moments.*' for a part)
	rm -rf mutants
	JAX_PLATFORMS=cpu $(BIN)/mutmut run $(ARGS)
	$(BIN)/python tests/mutation/survivors.py

clean:  ## Remove environments, caches and built files
	rm -rf .venv build dist demo-output mutants .hypothesis .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11 or newer: choose one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(AOT_VENV)/.installed: pyproject.toml
	test -x $(AOT_VENV)/bin/python || $(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[aot]'
	@touch $@

$(DOCS_VENV)/.installed: pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# Their requirements are complete, so that pip need not resolve and brings nothing along. Chainer has no
# wheel: setuptools, which a new environment of Python 3.11 has, builds one with the package wheel.
$(FRAMEWORK_VENVS)/%/.installed: tests/golden/requirements/%.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check wheel==0.45.1
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -r $<
	@touch $@

$(FUSED)/.installed: pyproject.toml $(wildcard fused_cpu/*.* fused_cpu/rmsprop_jax_fused/*.py)
	test -d $(FUSED) || $(PYTHON) -m venv $(FUSED)
	$(FUSED)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[plots]'
	$(FUSED)/bin/python -m pip install --quiet --disable-pip-version-check './fused_cpu[test]'
	@touch $@
