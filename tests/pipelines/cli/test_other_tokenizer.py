"""`kdata train --tokenizer`: one command from a dataset to a student with another tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import normalizers
from transformers import BartConfig
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, DataError
from kdata.jobs.combine import CombineConfig, combine
from kdata.pipelines.cli.main import app
from kdata.pipelines.recipe import load_recipe
from kdata.selection.position_rules import Surprise
from kdata.selection.ranked import All
from kdata.share.interchange.exporter import export_dataset
from kdata.store.token_map import MATCHED
from kdata.trainer.config import TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.parts.data import PackedRows
from kdata.trainer.train import train
from tests.tokenizers_of_kinds import SPECIAL, byte_tokenizer, saved

SIZES = ["student.kind=scratch", "student.hidden_size=32", "student.num_layers=1", "student.num_heads=2"]
SIZES += ["student.max_positions=1024", "context_tokens=1024", "batch_tokens=2048", "warmup_steps=1", "precision=fp32"]
T5GEMMA = {"kind": "scratch", "architecture": "t5gemma"}
BART = {"kind": "checkpoint", "model": "BART"}  # a folder of the test


def test_the_command_counts_the_text_where_no_distribution_is_kept(captured_once: Path, tmp_path: Path) -> None:
    """One command from a dataset to a student of bytes; the same command goes on and changes nothing."""
    folder = saved(byte_tokenizer(), tmp_path / "bytes")
    settings = ["steps=3", *SIZES]
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


def test_students_of_two_tokenizers_are_compared_by_bits_per_byte(captured_once: Path, tmp_path: Path) -> None:
    """Of a student of bytes every target but the ends is one byte."""
    folder, out = saved(byte_tokenizer(), tmp_path / "bytes"), tmp_path / "out"
    arguments = ["train", str(captured_once), "--tokenizer", str(folder), "--out", str(out)]
    arguments += [part for setting in ["steps=2", *SIZES] for part in ("--set", setting)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    made = kdata.open(out / "retokenized")
    rows = [made[row] for row in range(made.num_rows)]
    measured = evaluate(out / "model", made.path)
    for domain, figures in [*measured["domains"].items(), ("overall", measured["overall"])]:
        own = [row for row in rows if domain in ("overall", row.domain)]
        num_bytes = sum(int((row.token_ids[row.target_mask] >= len(SPECIAL)).sum()) for row in own)
        want = figures["nll"] * figures["tokens"] / num_bytes / math.log(2)
        assert figures["bits_per_byte"] == pytest.approx(want) and num_bytes > 20


def test_a_tokenizer_that_changes_most_texts_is_refused_before_training(captured_once: Path, tmp_path: Path) -> None:
    """What is left can be trained on by its name."""
    tokenizer = byte_tokenizer()
    texts = kdata.open(captured_once).index(["text"])["text"].to_pylist()
    word = max((word for text in texts for word in set(text.split())), key=lambda w: sum(w in t for t in texts))
    changed = sum(word in text for text in texts)
    assert len(texts) / 2 < changed < len(texts)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(word, word.upper() + "!")
    arguments = ["--out", str(tmp_path / "out"), "--steps", "2"]
    arguments += [part for setting in SIZES for part in ("--set", setting)]
    other = ["--tokenizer", str(saved(tokenizer, tmp_path / "other"))]
    refused = CliRunner().invoke(app, ["train", str(captured_once), *other, *arguments])
    assert isinstance(refused.exception, DataError)
    left = tmp_path / "out" / "retokenized"
    assert str(refused.exception).startswith(f"{changed} of {len(texts)} rows were left out")
    assert f"`kdata train {left}`" in str(refused.exception) and not (tmp_path / "out" / "model").exists()
    trained = CliRunner().invoke(app, ["train", str(left), "--set", "objective.cross_entropy_elsewhere=1", *arguments])
    assert trained.exit_code == 0, trained.output


def test_every_phase_counts_the_text_unless_it_says_otherwise(captured_once: Path, tmp_path: Path) -> None:
    folder = saved(byte_tokenizer(), tmp_path / "bytes")
    objectives: list[dict[str, Any]] = [{}, {"objective": {"weights": {"forward_kl": 1.0}}}]
    objectives.append({"objective": {"weights": {"forward_kl": 1.0}, "cross_entropy_elsewhere": None}})
    phases = [{"name": name, "steps": 2, **own} for name, own in zip("abc", objectives, strict=True)]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"phases": phases, "log_every_steps": 1}))
    out = tmp_path / "out"
    arguments = ["train", str(captured_once), "--tokenizer", str(folder), "--config", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *(part for setting in SIZES for part in ("--set", setting))])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counted = {line["phase"]: "cross_entropy_elsewhere" in line for line in lines}
    assert counted == {"a": True, "b": True, "c": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": [{"name": "a", "dataset": "other"}]}, "retokenize"),
        ({"phases": [{"name": "a", "plan": "other"}]}, "retokenize"),
        ({"objective": {"weights": {"forward_kk": 1.0}}}, "forward_kl"),
        ({"objective": {"weights": {"jsd": 1.0}}}, "not linear"),
        ({"objective": {"weights": {"uld": 1.0, "forward_kl": 1.0}}}, "which tokens the teacher believed in"),
        ({"objective": {"weights": {"uld": 1.0, "gold": 0.0}}}, "gold needs data|uld needs data"),
        ({"phases": [{"name": n, "objective": {"weights": {n: 1.0}}} for n in ("gold", "jsd")]}, "jsd needs to know"),
        ({"phases": [{"name": "a", "objective": {"temperature": 2.0}}]}, "temperature"),
        (
            {"student": T5GEMMA, "objective": {"weights": {"gold": 1.0}}},
            "gold does not go with t5gemma",
        ),
        (
            {"student": BART, "phases": [{"name": "a", "objective": {"weights": {"alm": 1.0}}}]},
            "alm does not go with bart",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    captured_once: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder, file, out = saved(byte_tokenizer(), tmp_path / "bytes"), tmp_path / "run.yaml", tmp_path / "out"
    BartConfig().save_pretrained(tmp_path / "bart")
    file.write_text(yaml.safe_dump({"warmup_steps": 1, **settings}).replace("BART", str(tmp_path / "bart")))
    arguments = ["train", str(captured_once), "--tokenizer", str(folder), "--config", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError) and re.search(message, str(result.exception))
    assert not out.exists()


@pytest.mark.parametrize(
    ("weights", "token_map"),
    [({"cross_entropy": 1.0, "uld": 1.5}, "ranks"), ({"gold": 1.0, "alm": 0.1}, "matched")],
)
def test_the_command_retokenizes_as_the_objective_asks(
    captured_once: Path, tmp_path: Path, weights: dict[str, float], token_map: str
) -> None:
    """And no one takes the sorted probabilities for tokens."""
    folder, file, out = saved(byte_tokenizer(), tmp_path / "bytes"), tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"objective": {"weights": weights}, "steps": 2}))
    arguments = ["train", str(captured_once), "--tokenizer", str(folder), "--config", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *(part for setting in SIZES for part in ("--set", setting))])
    assert result.exit_code == 0, result.output
    made = kdata.open(out / "retokenized")
    assert made.info.codec.token_map == token_map
    assert not (out / "model" / MATCHED).exists() and (out / "model" / "tokenizer.json").exists()
    others: list[Callable[[], object]] = [
        lambda: train(TrainConfig(context_tokens=1024), made.path, None, tmp_path / "other"),
        lambda: PackedRows(made, items=2, context_tokens=1024),
        lambda: evaluate(out / "model", made.path),
        lambda: export_dataset(made, tmp_path / "out.parquet", "plain"),
        lambda: combine(tmp_path / "c", [made, made], CombineConfig(weights=[0.5, 0.5])),
        lambda: kdata.retokenize(tmp_path / "again", made, kdata.RetokenizeConfig(tokenizer=str(folder))),
    ]
    for use in others:
        with pytest.raises(ConfigError, match="sorted probabilities"):
            use()


def test_objectives_of_other_tokenizers_are_refused_on_data_of_one(captured_once: Path, tmp_path: Path) -> None:
    """gold; and uld where a map has merged ids. Of the teacher's own tokenizer ranks are as good as any."""
    folder = saved(byte_tokenizer(), tmp_path / "bytes")
    prefix, _ = kdata.retokenize(
        tmp_path / "p", kdata.open(captured_once), kdata.RetokenizeConfig(tokenizer=str(folder))
    )
    for place, name in ((captured_once, "gold"), (prefix.path, "gold"), (prefix.path, "uld")):
        config = TrainConfig(objective=ObjectiveConfig(weights={name: 1.0}), context_tokens=1024)
        with pytest.raises(ConfigError, match=f"objective {name} needs data that was retokenized"):
            train(config, place, None, tmp_path / "run")
    with pytest.raises(ConfigError, match="objective gold needs data"):
        load_recipe(Path("quickstart"), ["students.plan.objective.weights={gold: 1.0}"])
    PackedRows(kdata.open(captured_once), items=1, objective={"weights": {"uld": 1.0}})


def test_rules_of_single_tokens_refuse_log_probabilities_of_chunks(captured_once: Path, tmp_path: Path) -> None:
    folder = saved(byte_tokenizer(), tmp_path / "bytes")
    config = kdata.RetokenizeConfig(tokenizer=str(folder))
    made, _ = kdata.retokenize(tmp_path / "made", kdata.open(captured_once), config)
    with pytest.raises(DataError, match="of chunks"):
        kdata.select(made, All(name="some", positions=Surprise(share=0.2)))
