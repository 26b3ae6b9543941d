# Every target sets itself up: on a fresh clone it makes .venv and installs what it needs, once.
#   make PYTHON=python3.12 test     another interpreter (3.10 or newer)
#   make PYTEST_ARGS='-k labels -x' test
#   make WORKERS=8 test                 more processes, of one thread each
#   make mutants MUTANTS='mit.py vit.py'   only the faults of these files
#   make TORCH_INDEX=URL demo           torch from that package index, such as the one of its builds for the CPU alone

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= 2
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow browser test-exhaustive test-oldest mutants fuzz check format index docs wheel wheel-test \
	clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

# ---- set-up: a stamp for each set of packages, renewed when pyproject.toml changes

# What is about to be installed, and torch first if it comes from elsewhere; with torchvision, which timm asks for and
# which goes with one build of torch alone.
define ANNOUNCE
@echo "Installing segzoo and what it needs into $(VENV)/, once. pip names each package with its size; torch is the"
@echo "largest by far, on Linux with several gigabytes of CUDA libraries unless TORCH_INDEX says otherwise (README.md)."
$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision)
endef

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit("segzoo needs Python 3.10 or newer: make PYTHON=... " if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-venv pyproject.toml
	$(ANNOUNCE)
	$(PIP) -e .
	@du -sh $(VENV)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-venv pyproject.toml
	$(ANNOUNCE)
	$(PIP) -e '.[test]'
	@du -sh $(VENV)
	@touch $@ $(VENV)/.stamp-core $(VENV)/.stamp-docs

# The type checker reads the packages that segzoo imports, so it needs what the tests do.
$(VENV)/.stamp-check: $(VENV)/.stamp-venv pyproject.toml
	$(ANNOUNCE)
	$(PIP) -e '.[test,dev]'
	@du -sh $(VENV)
	@touch $@ $(VENV)/.stamp-core $(VENV)/.stamp-test $(VENV)/.stamp-docs

$(VENV)/.stamp-docs: $(VENV)/.stamp-venv pyproject.toml
	$(ANNOUNCE)
	$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/.stamp-core

$(VENV)/.stamp-build: $(VENV)/.stamp-venv
	$(PIP) build
	@touch $@

# ---- what people run

demo: $(VENV)/.stamp-core  ## segment three synthetic scenes, results in demo_output/
	$(BIN)/segzoo demo -o demo_output

test: $(VENV)/.stamp-test  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# The largest models take several gigabytes each: no more than two processes.
test-slow: $(VENV)/.stamp-test  ## the slow tests: every model name
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

# The tests of the page drive it; without it they are skipped, but where CI is set. Needs root, or sudo.
browser:  ## install Debian's Chromium, if there is none
	@if test -z "$$SEGZOO_CHROMIUM" && ! command -v chromium && ! command -v chromium-browser; then \
		sudo=$$(test "$$(id -u)" -eq 0 || echo sudo); \
		$$sudo apt-get update --quiet && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium; \
	fi

test-exhaustive: $(VENV)/.stamp-test  ## further combinations of family, reduction, form and engine, beyond the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m exhaustive $(PYTEST_ARGS)

mutants: $(VENV)/.stamp-test  ## deliberate faults, one at a time: which of them does no test find?
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS)

# Files that break the promise are kept, and named.
fuzz: $(VENV)/.stamp-test  ## hostile files into every reader, N=1000 each: does anything but a refusal come out?
	SEGZOO_FUZZ_CASES=$(or $(N),1000) $(BIN)/python -m pytest -m slow -s tests/fuzz $(PYTEST_ARGS)

# An environment of its own, of several gigabytes; torch 2.6 needs Python 3.13 or older. What records models for engines
# needs a newer torch (segzoo/engines/forms.py) and is left out.
RECORDING := engines.py export.py certification.py
test-oldest:  ## the fast tests with the oldest torch and timm that pyproject.toml allows
	rm -rf build/oldest-env && mkdir -p build
	$(PYTHON) -m venv build/oldest-env
	sed -n 's/^ *"\(torch\|timm\)>=\([0-9.]*\)",$$/\1==\2/p' pyproject.toml > build/oldest.txt
	test "$$(wc -l < build/oldest.txt)" -eq 2
	build/oldest-env/bin/python -m pip --disable-pip-version-check install --quiet -c build/oldest.txt -e '.[test]'
	OMP_NUM_THREADS=1 build/oldest-env/bin/python -m pytest -n $(WORKERS) $(addprefix --ignore=tests/test_,$(RECORDING)) \
		$(PYTEST_ARGS)

check: $(VENV)/.stamp-check  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.stamp-check  ## let ruff sort imports and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

index: $(VENV)/.stamp-core  ## names, weights rows and figures anew, after a family has changed
	$(BIN)/python -m segzoo.zoo.index

# The variable silences what the theme has to say about other versions of mkdocs.
docs: $(VENV)/.stamp-docs  ## the documentation as a site, in build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# `python -m build` makes the wheel from the source archive, so that both are proved complete.
wheel: $(VENV)/.stamp-build  ## source archive and wheel in build/dist/
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist

# Run in the empty environment, outside the source tree (its path is the first argument): does the installed package
# have every module and data file of the source?
define CHECK_INSTALLED
import sys
from pathlib import Path
import segzoo
source, installed = Path(sys.argv[1]).resolve(), Path(segzoo.__file__).resolve().parent
assert installed != source and Path(sys.prefix).resolve() in installed.parents, f"not the installed package: {installed}"
patterns = ("py.typed", "**/*.py", "labels/*.json", "training/recipes/*.json", "weights/*", "zoo/index.json")
for pattern in patterns:
    wanted = {p.relative_to(source) for p in source.glob(pattern) if p.is_file() and not p.name.startswith(".")}
    missing = sorted(str(p) for p in wanted if not (installed / p).is_file())
    assert wanted, f"the source has no {pattern}"
    assert not missing, f"missing in the wheel: {missing}"
    print(f"{pattern}: {len(wanted)} files installed")
endef
export CHECK_INSTALLED

wheel-test: wheel  ## build the wheel, install it in an empty environment, run the demo there
	rm -rf build/wheel-env
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip --disable-pip-version-check install --quiet build/dist/*.whl
	set -e; run=$$(mktemp -d); trap 'rm -rf "$$run"' EXIT; cd "$$run"; bin='$(CURDIR)/build/wheel-env/bin'; \
	"$$bin/python" -I -c "$$CHECK_INSTALLED" '$(CURDIR)/segzoo'; \
	"$$bin/segzoo" demo -o demo_output; \
	test -n "$$(ls demo_output)"
	rm -rf build/wheel-env

clean:  ## remove what building and running leave behind (keeps .venv)
	rm -rf build dist demo_output *.egg-info .pytest_cache .ruff_cache .hypothesis
