# `make help` lists the targets. Needed: GNU make and Python 3.11 or newer with its venv module.

VENV := .venv
BIN := $(VENV)/bin
# $(call PIP_INSTALL,arguments): silent when all is well, all that pip said when it is not.
PIP_INSTALL = log=$$($(BIN)/python -m pip install -q --no-input --disable-pip-version-check -c constraints.txt $(1) 2>&1) || { echo "$$log" >&2; exit 1; }
# PyPI's torch for Linux brings gigabytes of CUDA; here are the same releases for the processor alone. Empty: do not ask.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Tests use small models in several processes: threads that spin for work would only be in each other's way.
TESTING := OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
# Processes that share the tests, a file each at a time, for a file's tests share what was costly to set up. Notebooks
# come first: a long file at the end would leave the other process without work.
TEST_JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check bench docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed ## three hospitals and a trunk server on this machine: trains, prints a report and a picture
	@$(BIN)/splitfl demo

test: $(VENV)/.installed-dev ## every test but the slow ones, and the notebooks
	@$(TESTING) $(BIN)/pytest -m "not slow" -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --nbmake $(wildcard notebooks) tests

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	@$(TESTING) $(BIN)/pytest -m slow -n $(TEST_JOBS) tests

check: $(VENV)/.installed-dev ## lint, format, types, who may import whom
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy --strict
	@$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed ## speed and memory, as JSON in results/
	@$(BIN)/splitfl bench overhead --steps 8 --out results
	@$(BIN)/splitfl bench memory --out results
	@$(BIN)/splitfl bench startup --out results
	@$(BIN)/splitfl bench pipe --out results
	@$(BIN)/splitfl bench wan --out results
	@$(BIN)/splitfl bench planner --out results
	@$(BIN)/splitfl bench scale --out results

docs: $(VENV)/.installed ## write docs/federation.md and docs/commands.md anew from the code
	@$(BIN)/python docs/generate.py

install: $(VENV)/.installed ## .venv with splitfl in it

clean: ## remove .venv, caches and build leftovers; runs/ and results/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# -- installation: once, and again when pyproject.toml or constraints.txt change -----------------------------------

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(FIND_PYTHON); "$$python" -m venv --clear $(VENV); }
	@echo "installing into $(VENV): some minutes the first time, for torch alone is about 200 MB" >&2
	@$(FETCH_CPU_TORCH)
	@$(call PIP_INSTALL,-e .)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests and checks need" >&2
	@$(call PIP_INSTALL,-e '.[dev]')
	@touch $@

# Sets $python to the first interpreter that will do; PYTHON=... names one. Shims that lead nowhere are tried too, so run it.
define FIND_PYTHON
python=; \
for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	if "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$name; break; fi; \
done; \
if [ -z "$$python" ]; then \
	echo "error: no Python 3.11 or newer with its venv module was found." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1; \
fi
endef

# With a GPU, or away from Linux, PyPI's torch is the right one. An index that cannot be reached is passed over.
define FETCH_CPU_TORCH
if [ -n "$(TORCH_CPU_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	$(call PIP_INSTALL,--no-deps --retries 2 --timeout 30 --extra-index-url "$(TORCH_CPU_INDEX)" torch); \
fi
endef
