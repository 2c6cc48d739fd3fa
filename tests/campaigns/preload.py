"""What children of campaigns need, imported once by their server; no thread may start here."""

import importlib
import sys

import duckdb  # noqa: F401
import safetensors.torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.preload  # noqa: F401
from kdata.pipelines.cli.main import COMMANDS

# Each command imports what it needs when it is called, which would take longer than most cases.
for place in {entry.place.partition(":")[0] for group in COMMANDS.values() for entry in group.values()}:
    importlib.import_module(f"kdata.pipelines.cli.{place}")

assert "torch" in sys.modules
