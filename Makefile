# `make demo` and `make test` need nothing but Python >= 3.11 and make: each sets everything up by itself.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python >= 3.11 is needed: install it, or say where it is: make demo PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) -V): make demo PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# MuJoCo 4 keeps files of its own in the folder of MuJoCo 3: where they stay, the older one does not import.
	@VIRTUAL_ENV="$$(cd $(VENV) && pwd)" $(BIN)/python -m uv pip uninstall --quiet mujoco-core mujoco-studio 2>/dev/null || true
	VIRTUAL_ENV="$$(cd $(VENV) && pwd)" $(BIN)/python -m uv pip install --quiet --compile-bytecode --requirements requirements.lock
	VIRTUAL_ENV="$$(cd $(VENV) && pwd)" $(BIN)/python -m uv pip install --quiet --no-deps --editable .
	@touch $@

demo: $(READY)  ## train, fine-tune and evaluate a small VLA on the embedded tabletop world (9 to 20 minutes, 2 cores)
	$(BIN)/python -m openvla_lightning.demo

train: $(READY)  ## pretrain the small VLA
	$(BIN)/python train.py

test: $(READY)  ## every test (10 to 14 minutes, 2 cores)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=10

test-lowest: $(READY)  ## the tests on the lowest versions that pyproject.toml allows (needs a network): build/lowest
	$(BIN)/python -m uv venv --quiet --allow-existing --python $(BIN)/python build/lowest
	$(BIN)/python -m uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	build/lowest/bin/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

check: $(READY)  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(READY)  ## the pages and the API reference as a site: build/site/index.html
	$(BIN)/mkdocs build --strict --quiet && echo build/site/index.html

dist: $(READY)  ## wheel and sdist in build/dist, looked at as the package index looks at them (needs a network)
	rm -rf build/dist
	$(BIN)/python -m uv build --quiet --python $(BIN)/python --out-dir build/dist
	$(BIN)/python -m uv tool run twine check --strict build/dist/*.whl build/dist/*.tar.gz

config: $(READY)  ## print what train.py would run; make config ARGS='+experiment=oxe_full'
	$(BIN)/python train.py --cfg job --resolve $(ARGS)

clean:  ## remove runs, generated data and caches (never the environment or your own datasets)
	rm -rf runs multirun data/tabletop_* .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: help demo train test test-lowest check docs dist config clean
