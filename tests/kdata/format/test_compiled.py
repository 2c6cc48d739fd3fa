"""Compiled code gives the same bits in the process that compiles it, in those that load it, and where it cannot be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import rows_of_text, run_capture, run_generate, write_jsonl

ROOT = Path(__file__).resolve().parents[3]


def make(folder: str, corpus: str, tokenizer: str) -> None:
    """Rows of every kind of arithmetic: what a teacher's logits become, encoded and compared."""
    settings = {"kind": "hybrid", "k": 4, "num_draws": 6}
    run_generate(Path(folder), Path(corpus), Path(tokenizer), **settings)
    run_capture(Path(folder), Path(corpus), Path(tokenizer), **settings)


# Only numba's place for notebooks: it has none then, as where neither the code's folder nor a home can be written.
NOWHERE = {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}


def test_a_dataset_is_read_where_compiled_code_has_no_place(captured: Path) -> None:
    code = "import sys, kdata; print(kdata.open(sys.argv[1])[0].entropy[1:].sum())"
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, str(captured)],
            env={**os.environ, **place}, check=True, capture_output=True, text=True, timeout=300,
        ).stdout
        for place in ({}, NOWHERE)
    ]  # fmt: skip
    assert float(printed[0]) > 0 and printed[0] == printed[1]


@pytest.mark.slow
def test_the_process_that_compiles_and_the_next_one_write_the_same_bytes(tmp_path: Path, tokenizer_dir: Path) -> None:
    from tests.fakes import digests

    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(12))
    code = "import sys; from tests.kdata.format.test_compiled import make; make(*sys.argv[1:])"
    cache = tmp_path / "cache"
    for name, place in (("compiled", {}), ("loaded", {}), ("without", NOWHERE)):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name), str(corpus), str(tokenizer_dir)],
            cwd=ROOT, env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **place},
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        assert list(cache.rglob("row_kernel.reduce_rows*.nbc"))
    assert digests(tmp_path / "compiled") == digests(tmp_path / "loaded") == digests(tmp_path / "without")
