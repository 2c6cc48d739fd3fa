"""What children of campaigns need, imported once by their server; no thread may start here."""

import sys

import duckdb  # noqa: F401
import safetensors.torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.preload  # noqa: F401

assert "torch" in sys.modules
