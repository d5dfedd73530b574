# make demo    train and evaluate on real photographs
# make smoke   the same on drawn images, in about a minute
# make test    ruff, import-linter, pyright, pytest
# make clean   remove the environments and caches, never the runs
#
# All of it in .venv, made from PYTHON (3.11, 3.12 or 3.13): make demo PYTHON=python3.12
#
# make test-core    the core of the suite, without the linters
# make test-colab   the same in .venv-colab with Colab's versions: make test-colab PYTHON=python3.13

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS)

# What .ci/run repeats on other Pythons and versions: the modules that depend most on those of JAX,
# Flax, Orbax and Grain, runs from start to end, and the notebooks.
CORE := notebooks objective projection sharding train_step train checkpoint pipeline evaluate main \
  elpv
CORE_FILES := $(CORE:%=tests/test_%.py)

.PHONY: demo smoke test test-core test-colab lint clean

demo: $(VENV)/.demo
	$(BIN)/pae train --config=elpv --workdir=runs/elpv
	$(BIN)/pae evaluate --workdir=runs/elpv

smoke: $(VENV)/.pae
	$(BIN)/pae train --config=smoke --workdir=runs/smoke
	$(BIN)/pae evaluate --workdir=runs/smoke

test: lint
	$(PYTEST)

test-core: $(VENV)/.test
	$(PYTEST) $(CORE_FILES)

test-colab:
	$(MAKE) test-core VENV=.venv-colab CONSTRAINTS=colab/constraints.txt PYTHON=$(PYTHON)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find pae_jax data_pipelines configs tests benchmarks experiments -name __pycache__ -prune -exec rm -rf {} +

# Each stamp stands on the one before, so that under make -j one pip runs at a time.
$(VENV)/.python-$(VERSION):
	@case '$(VERSION)' in 3.11|3.12|3.13) ;; *) \
	  echo '$(PYTHON) is $(if $(VERSION),Python $(VERSION),no Python); needed is 3.11, 3.12 or 3.13, as in PYTHON=python3.12' >&2; \
	  exit 1;; esac
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.pae: pyproject.toml $(CONSTRAINTS) $(VENV)/.python-$(VERSION)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.pae
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) -e '.[test]'
	@touch $@
