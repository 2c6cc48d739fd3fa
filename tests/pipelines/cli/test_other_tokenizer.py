"""`kdata train --tokenizer`: one command from a dataset to a student with another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kdata.errors import ConfigError
from kdata.pipelines.cli.main import app
from tests.tokenizers_of_kinds import byte_tokenizer, saved


def test_the_command_counts_the_text_where_no_distribution_is_kept(captured_once: Path, tmp_path: Path) -> None:
    """One command from a dataset to a student of bytes; the same command goes on and changes nothing."""
    folder = saved(byte_tokenizer(), tmp_path / "bytes")
    settings = ["steps=3", "warmup_steps=1", "batch_tokens=2048", "context_tokens=1024", "precision=fp32"]
    settings += [
        "student.kind=scratch",
        "student.hidden_size=32",
        "student.num_layers=1",
        "student.num_heads=2",
        "student.max_positions=1024",
    ]
    arguments = ["train", str(captured_once), "--tokenizer", str(folder), "--out", str(tmp_path / "out")]
    arguments += [part for setting in settings for part in ("--set", setting)]
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "cross_entropy_elsewhere is 1" in result.output and "of the student have a distribution" in result.output
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["cross_entropy_elsewhere"] > 0 and line["step"] == 3
    refused = CliRunner().invoke(app, [*arguments, "--plan", "x"])
    assert isinstance(refused.exception, ConfigError) and "retokenize" in str(refused.exception)
