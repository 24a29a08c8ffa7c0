# `make` lists the targets. The first one that needs Python makes .venv and installs what constraints.txt pins; later ones reuse it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
JOBS ?= 2

PACKAGED := $(shell find nbengine kernels widgets -type f -not -name '*.pyc')
# Links in the shape of an installed package: a type checker does not run an editable install's hooks.
TYPES := build/types/nbengine

# Node's own test runner runs the scripts' tests; what formats and type-checks them is pinned in package.json.
NODE := build/node
NODE_TOOLS := $(NODE)/node_modules/.bin
# What draws widgets in pages without a kernel; its own dependencies, which are in these files, would be 120 MB.
EMBED := build/embed
EMBED_PACKAGES := @jupyter-widgets/html-manager@1.0.15 requirejs@2.3.8
SCRIPTS := 'widgets/*.js' 'widgets/*.css' 'tests/widgets/*.js' package.json
TSC := --noEmit --allowJs --checkJs --strict --target es2022 --module es2022 --moduleResolution bundler --lib es2022,dom,dom.iterable --types ""

BIG_DOWNLOADS := sed -unE 's/^ *(Downloading .*[0-9] [MG]B\))/  \1/p'

# Torch's idle threads spin for long by default, and on a busy machine they then take the cores from the threads that they wait for.
export GOMP_SPINCOUNT ?= 1000
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: help setup demo lab test test-all test-gpu coverage lint format wheel smoke constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv and install nbengine and its tools there
	@echo "$(VENV) is ready"

demo: $(READY) ## run the quickstart notebook on the bundled model and show what the engine did
	@$(BIN)/python notebooks/run.py notebooks/01_quickstart.ipynb --out out

lab: $(READY) ## open JupyterLab on the quickstart
	@echo "Opening JupyterLab on notebooks/01_quickstart.ipynb (Ctrl-C twice ends it)"
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/01_quickstart.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: $(READY) $(EMBED)/.ready ## run the tests, but for the long sweeps and those that need a GPU
	@echo "Testing the scripts"
	@node --test --test-reporter=dot tests/widgets/*.js
	@echo "Testing with $(JOBS) workers (JOBS=0 runs in one process)"
	@$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-all: $(READY) $(EMBED)/.ready ## run the long sweeps too
	@echo "Testing with the long sweeps, $(JOBS) workers"
	@$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not gpu" --hypothesis-profile=long $(ARGS)

test-gpu: $(READY) ## run the tests that need an NVIDIA GPU
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs an NVIDIA GPU and a CUDA build of torch; this torch sees none")'
	@echo "Testing on $$($(BIN)/python -c 'import torch; print(torch.cuda.get_device_name())')"
	@$(BIN)/pytest -m gpu $(ARGS)

coverage: $(READY) ## run the tests and write out/coverage/index.html
	@$(BIN)/pytest -n $(JOBS) --dist loadfile --cov --cov-report=term --cov-report=html:out/coverage $(ARGS)

lint: $(READY) $(NODE)/.ready ## check style, formatting and types
	@echo "Checking style"
	@$(BIN)/ruff check .
	@echo "Checking formatting"
	@$(BIN)/ruff format --check .
	@$(NODE_TOOLS)/prettier --log-level=warn --check $(SCRIPTS)
	@echo "Checking types"
	@rm -rf $(TYPES) && mkdir -p $(TYPES) && ln -s $(CURDIR)/nbengine/* $(CURDIR)/kernels $(CURDIR)/widgets $(TYPES)/
	@cd $(dir $(TYPES)) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p nbengine
	@$(NODE_TOOLS)/tsc $(TSC) widgets/*.js

format: $(READY) $(NODE)/.ready ## let ruff and prettier mend style and formatting
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(NODE_TOOLS)/prettier --log-level=warn --write $(SCRIPTS)

wheel: dist/.built ## build the wheel and the source archive in dist/
	@ls dist/*.whl dist/*.tar.gz

dist/.built: $(PACKAGED) pyproject.toml README.md LICENSE MANIFEST.in | $(READY)
	@echo "Building the source archive, and the wheel from it"
	@rm -rf dist && mkdir -p build
	@$(BIN)/python -m build --no-isolation --outdir dist . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@touch $@

smoke: dist/.built ## install the built wheel into a fresh environment and try it from a neutral directory
	@echo "Trying the wheel"
	@rm -rf build/smoke && mkdir -p build/smoke/cwd
	@$(BIN)/python -m venv --without-pip build/smoke/venv
	@$(BIN)/python -m pip --python build/smoke/venv/bin/python install --quiet --no-deps dist/*.whl
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(build/smoke/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	@cd build/smoke/cwd && ../venv/bin/python $(CURDIR)/tests/packaging/smoke.py

constraints: ## pin anew, in constraints.txt, the newest versions that install together, torch's apart
	@rm -rf build/constraints
	@$(PYTHON) -m venv build/constraints
	@echo "Installing the newest versions (torch and triton stay) into build/constraints"
	@build/constraints/bin/pip install --quiet --upgrade pip setuptools
	@build/constraints/bin/pip install --quiet --no-build-isolation $$(grep -E '^(torch|triton)==' constraints.txt) -e '.[triton]' --group dev
	@{ sed '/^[^#]/,$$d' constraints.txt; build/constraints/bin/pip freeze --all --exclude-editable | sed 's/+.*//' | sort -f; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/constraints

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist out *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing nbengine and its tools into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[triton]' --group dev | $(BIG_DOWNLOADS)
	@install -D -m 644 -t $(VENV)/etc/jupyter/jupyter_server_config.d nbengine/server_extension/nbengine.json # as the wheel does
	@touch $@

$(NODE)/.ready: package.json
	@command -v node npm > /dev/null || { echo "the scripts' tools need node and npm: apt install nodejs npm" >&2; exit 1; }
	@echo "Installing prettier and typescript into $(NODE)"
	@rm -rf $(NODE) && mkdir -p $(NODE) && cp package.json $(NODE)/
	@npm install --prefix $(NODE) --no-audit --no-fund --silent
	@touch $@

$(EMBED)/.ready: Makefile
	@command -v npm > /dev/null || { echo "the tests of pages with widgets need npm: apt install npm" >&2; exit 1; }
	@echo "Fetching $(EMBED_PACKAGES) into $(EMBED)"
	@rm -rf $(EMBED) && mkdir -p $(EMBED)
	@npm pack --silent --pack-destination $(EMBED) $(EMBED_PACKAGES) > /dev/null
	@tar xzf $(EMBED)/jupyter-widgets-html-manager-*.tgz -C $(EMBED) --strip-components=2 package/dist/embed-amd.js
	@tar xzf $(EMBED)/requirejs-*.tgz -C $(EMBED) --strip-components=1 package/require.js
	@touch $@

$(BIN)/python:
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nbengine needs Python 3.11 or newer: run make with PYTHON=python3.12, say")'
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && [ "$$($(PYTHON) -c 'import sys; print(sys.prefix)')" = /usr ]; then \
			echo "Debian's Python comes without venv: installing python3-venv"; \
			apt-get update -qq && apt-get install -y -qq python3-venv > /dev/null; \
		else \
			echo "$(PYTHON) comes without venv. On Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 1; \
		fi; \
	fi
	@$(PYTHON) -m venv $(VENV)
