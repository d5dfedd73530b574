# make demo    train and evaluate on real photographs
# make smoke   the same on drawn images, in about a minute
# make test    ruff, import-linter, pyright, pytest
# make clean   remove the environment and caches, never the runs
#
# All of it in .venv, made from PYTHON (3.11 or 3.12): make demo PYTHON=python3.12

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo smoke test lint clean

demo: $(VENV)/.demo
	$(BIN)/pae train --config=elpv --workdir=runs/elpv
	$(BIN)/pae evaluate --workdir=runs/elpv

smoke: $(VENV)/.pae
	$(BIN)/pae train --config=smoke --workdir=runs/smoke
	$(BIN)/pae evaluate --workdir=runs/smoke

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find pae_jax data_pipelines configs tests benchmarks experiments -name __pycache__ -prune -exec rm -rf {} +

# Each stamp stands on the one before, so that under make -j one pip runs at a time.
$(VENV)/.python-$(VERSION):
	@case '$(VERSION)' in 3.11|3.12) ;; *) \
	  echo '$(PYTHON) is $(if $(VERSION),Python $(VERSION),no Python); needed is 3.11 or 3.12, as in PYTHON=python3.12' >&2; \
	  exit 1;; esac
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.pae: pyproject.toml constraints.txt $(VENV)/.python-$(VERSION)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.pae
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) -e '.[test]'
	@touch $@
