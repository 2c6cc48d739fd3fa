"""The questions of positions and of tokenizers: equal terms, and one tiny comparison each from text to table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kdata.errors import ConfigError
from kdata.format.keep import KeepConfig
from kdata.pipelines.evidence import capacity, figures, positions, positions_figures, tokenizers
from kdata.pipelines.evidence.advice import sizes_of
from kdata.pipelines.evidence.data import DataConfig, EvidenceData
from kdata.pipelines.evidence.offline import REFERENCE, Offline, OfflineConfig, find
from kdata.pipelines.evidence.runs import load_runs, path_of, run_all
from kdata.trainer.config import ScratchStudent
from tests.fakes import rows_of_text, save_llama


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> EvidenceData:
    """A tiny random teacher's data."""
    folder = tmp_path_factory.mktemp("evidence")
    rows = [{n: r[n] for n in ("id", "domain", "text")} for r in rows_of_text(120)]
    pl.DataFrame(rows).write_parquet(folder / "corpus.parquet")
    config = DataConfig(
        teacher=str(llama_dir), corpus=str(folder / "corpus.parquet"), train_tokens=1500, heldout_tokens=100,
        context_tokens=64,
    )  # fmt: skip
    return EvidenceData(config, folder / "data")


SIZES = {"student": ScratchStudent(hidden_size=32, num_layers=1, num_heads=2), "steps": 4, "warmup_steps": 1}


def test_settings_have_files_and_datasets_of_their_own(data: EvidenceData) -> None:
    chosen = positions.settings("/models/student")
    assert len({path_of(Path(), s.name, 0) for s in chosen}) == len(chosen)
    described = {json.dumps(s.describe(), sort_keys=True) for s in chosen if s.name not in (REFERENCE,)}
    assert len(described) == len(chosen) - 1 and not any("/models" in text for text in described)
    assert not any(s.family.startswith("gap") for s in positions.settings(None))
    folders = {data.train(s.keep).path for s in chosen if s.keep is not None and s.step is None and "0.2" in s.name}
    assert len(folders) == 2  # random and entropy; with and without the text they are trained from one dataset


def test_positions_from_text_to_table(data: EvidenceData, llama_dir: Path, tmp_path: Path) -> None:
    chosen = positions.settings(str(llama_dir))
    names = [REFERENCE, "random 0.2", "random 0.2, with text", "gap 0.2", "all positions of 0.6 of the rows"]
    config = OfflineConfig.model_validate({"data": data.config, "batch_tokens": 256, "precision": "fp32", **SIZES})
    measure = Offline(config, data, chosen).measure
    wanted = [(name, seed) for name in names for seed in (0, 1)]
    described = {s.name: s.describe() for s in chosen}
    assert run_all(tmp_path / "runs", wanted, measure, config.identity(), describe=described.__getitem__) == 10
    runs = load_runs(tmp_path / "runs", [s.name for s in chosen])
    assert list(runs) == names[:4] + names[4:]
    size = {name: runs[name][0]["bytes_per_token"] for name in names[1:]}
    assert size["random 0.2"] == size["random 0.2, with text"] < size["gap 0.2"]  # type: ignore[operator]
    assert size[names[4]] == pytest.approx(0.6 * size["gap 0.2"])  # type: ignore[operator]
    assert runs["random 0.2"][0]["nll"] != runs["random 0.2, with text"][0]["nll"]
    table = figures.write_report(tmp_path, runs, lambda *parts: positions_figures.plot(chosen, *parts))
    assert table.count("\n| ") == len(names) and (tmp_path / "evidence.png").stat().st_size < 150_000


def test_a_share_for_longer_takes_more_steps(data: EvidenceData) -> None:
    config = OfflineConfig.model_validate({"data": data.config, "batch_tokens": 256, **SIZES, "steps": 100})
    longer = next(s for s in positions.settings(None) if s.times != 1)
    assert Offline(config, data, ()).train_config(longer, 0).steps == round(100 * positions.LONGER)
    with pytest.raises(ConfigError, match="there is no setting"):
        find("nothing", positions.settings(None))


def test_tokenizers_from_text_to_table(data: EvidenceData, tmp_path: Path) -> None:
    config = tokenizers.TokenizersConfig.model_validate({"data": data.config, "batch_tokens": 1024, **SIZES})
    asked = tokenizers.Tokenizers(config, data)
    names = ["teacher's: text alone", "bytes: text alone", "bytes: text and ULD", "bytes: text and GOLD"]
    wanted = [(name, 0) for name in names]
    assert run_all(tmp_path / "runs", wanted, asked.measure, config.identity()) == 4
    runs = load_runs(tmp_path / "runs", [s.key for s in tokenizers.SETTINGS])
    table = tokenizers.write_report(tmp_path, runs)
    assert table.count("\n| ") == 4 and "| bytes: text alone |" in table
    heldout = data.heldout
    # Bits per byte by hand: every target of the teacher's own tokens, and the bytes of the texts but for the first token.
    targets = int(np.sum(heldout.index(["num_target_tokens"])["num_target_tokens"].to_numpy()))
    num_bytes = sum(len(text.encode()) for text in heldout.index(["text"])["text"].to_pylist())
    by_hand = float(runs[names[0]][0]["nll"] or 0) * targets / math.log(2) / num_bytes
    assert runs[names[0]][0]["bits_per_byte"] == pytest.approx(by_hand, rel=0.2)
    of_rows = [(heldout.token_bytes(row.number), row.target_mask) for row in heldout]
    num_bytes = sum(int(sizes[mask].sum(dtype=np.int64)) for sizes, mask in of_rows if sizes is not None)
    for kind in ("", "teacher_"):
        exact = float(runs[names[0]][0][f"{kind}nll"] or 0) * targets / math.log(2) / num_bytes
        assert runs[names[0]][0][f"{kind}bits_per_byte"] == pytest.approx(exact, rel=1e-12)
    teacher = [runs[name][0]["teacher_bits_per_byte"] for name in names]
    assert teacher[1] == pytest.approx(teacher[0], rel=0.2) and teacher[2:] == pytest.approx(
        [teacher[1]] * 2, rel=1e-12
    )
    with pytest.raises(ConfigError, match="there is no setting"):
        tokenizers.find("other")


def test_sizes_from_text_to_table(data: EvidenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes differ in nothing else; the smaller teacher's students are measured on the teacher's held-out text."""
    smaller = save_llama(tmp_path / "reference", seed=1)
    monkeypatch.setattr(capacity, "SIZES", {"narrow": (16, 1, 2), "wide": (32, 1, 2)})
    sizes = {"steps": 4, "warmup_steps": 1, "batch_tokens": 256}
    config = capacity.CapacityConfig.model_validate({"data": data.config, "reference": str(smaller), **sizes})
    asked = capacity.Capacity(config, data.folder)
    names = ["narrow: text alone", "narrow: teacher", "narrow: reference", "wide: teacher"]
    wanted, describe = [(name, 0) for name in names], lambda name: capacity.find(name).describe()
    assert run_all(tmp_path / "runs", wanted, asked.measure, config.identity(), describe=describe) == 4
    runs = {name: seeds[0] for name, seeds in load_runs(tmp_path / "runs", names).items()}
    table = capacity.write_report(tmp_path, load_runs(tmp_path / "runs", [s.key for s in capacity.SETTINGS]))
    assert table.count("\n| ") == 4 and "| narrow, 0.01M | text alone |" in table
    assert runs[names[0]]["teacher_params"] is None and runs[names[2]]["teacher_params"]
    assert (
        runs[names[1]]["nll"] != runs[names[2]]["nll"]
        and runs[names[1]]["teacher_nll"] == runs[names[2]]["teacher_nll"]
    )
    narrow, wide = sizes_of(tmp_path / "results.json")
    assert (narrow["params"], wide["params"]) == (runs[names[0]]["params"], runs[names[3]]["params"])
    gap = runs[names[2]]["nll"] / runs[names[1]]["nll"] - 1  # type: ignore[operator]
    assert narrow["smaller_teacher"]["mean"] == pytest.approx(gap) and wide["smaller_teacher"] is None
    with pytest.raises(ConfigError, match="there is no setting"):
        capacity.find("other")


def test_every_dataset_is_made_once(data: EvidenceData) -> None:
    assert data.train(KeepConfig()).path == data.train(KeepConfig()).path
