"""From YAML and --set to typed settings: what is wrong is named, with the nearest that is right."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest

from kdata import errors
from kdata.config import apply_settings, parse_config, read_yaml
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError, KdataError, MissingError, settings_difference
from kdata.format.keep import KINDS_WITH, KeepConfig
from kdata.jobs.reading import CaptureConfig
from kdata.jobs.writing import GenerateConfig
from kdata.loader.batches import BatchesConfig
from kdata.selection.position_rules import Entropy
from kdata.teachers.config import TeacherConfig
from kdata.trainer.config import CheckpointStudent


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (
            CaptureConfig,
            {"corpus": {"path": "x"}, "unit_token": 5},
            r"unknown key 'unit_token' \(did you mean 'unit_tokens'\?\)",
        ),
        (CaptureConfig, {"corpus": {"pth": "x"}}, r"unknown key 'corpus.pth' \(did you mean 'path'\?\)"),
        (
            GenerateConfig,
            {"prompts": {"path": "x"}, "sampling": {"temprature": 1}},
            r"'sampling.temprature' \(did you mean 'temperature'",
        ),
        (CaptureConfig, {}, "'corpus' is missing"),
        (
            CaptureConfig,
            {"corpus": {"path": "x"}, "k": 0},
            r"k: Input should be greater than or equal to 1 \(got 0\)",
        ),
        (
            TeacherConfig,
            {"model": "x", "backend": "vlm"},
            r"backend: Input should be 'vllm', 'vllm-server' or 'transformers'.* \(got 'vlm'\)",
        ),
        (
            CaptureConfig,
            {"corpus": {"path": "x"}, "kind": "adaptive", "k": 2, "min_k": 5},
            "min_k=5 exceeds the cap k=2",
        ),
    ],
)
def test_each_mistake_names_key_value_and_nearest(model: type, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(model, values, "capture settings")
    first, *others = str(caught.value).splitlines()
    assert first.startswith("capture settings:") and all(line.startswith("  ") for line in others)
    assert len(others) != 1, "one problem stands on the first line"


def test_every_problem_is_listed_on_a_line_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(CaptureConfig, {"k": 0, "lang_text": "x"}, "here")
    assert len(str(caught.value).splitlines()) == 4


def test_set_assigns_a_dotted_key_and_reads_the_value_as_yaml() -> None:
    before = {"capture": {"k": 64, "corpus": {"path": "a"}}, "steps": 3}
    after = apply_settings(
        before,
        [
            "capture.k=32",
            "capture.corpus.domains=[code, prose]",
            "new.deep.key=null",
            "steps=1e3",
            "text=a=b",
            "empty=",
        ],
    )
    assert after == {
        "capture": {"k": 32, "corpus": {"path": "a", "domains": ["code", "prose"]}},
        "new": {"deep": {"key": None}},
        "steps": "1e3",
        "text": "a=b",
        "empty": None,
    }
    assert before == {"capture": {"k": 64, "corpus": {"path": "a"}}, "steps": 3}


@pytest.mark.parametrize("setting", ["capture.k", "=5", "capture.k=[1"])
def test_a_malformed_set_option_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_settings({}, [setting])


def test_a_yaml_file_must_exist_and_hold_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no.yaml does not exist"):
        read_yaml(tmp_path / "no.yaml")
    for content in (b"- a list", b"a: [", b"\xff\xfe\x00", b""):
        (tmp_path / "x.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x.yaml"):
            read_yaml(tmp_path / "x.yaml")


def test_a_difference_has_one_line_for_each_setting() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 3}
    after = {"a": 1, "b": {"c": [1, 3]}, "new": 4}
    assert settings_difference(before, after).splitlines() == [
        "  b.c: [1, 2] -> [1, 3]",
        "  gone: 3 -> None",
        "  new: None -> 4",
    ]
    assert settings_difference(before, dict(before)) == ""


def test_every_error_inherits_a_standard_error_and_can_be_pickled() -> None:
    kinds = [
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, KdataError) and e is not KdataError
    ]
    assert len(kinds) > 10
    for kind in kinds:
        assert any(base.__module__ == "builtins" and base is not Exception for base in kind.__mro__[1:-3])
        again = ForkingPickler.loads(ForkingPickler.dumps(kind("the cause; the remedy")))
        assert type(again) is kind and str(again) == "the cause; the remedy"


@pytest.mark.parametrize("name", ["k", "mass", "min_k", "num_draws", "tau", "draw_method"])
def test_a_setting_of_another_kind_is_refused_where_no_kind_is_named(name: str) -> None:
    """Who sets k does not mean the default kind, which has none."""
    values = {"k": 4, "mass": 0.9, "min_k": 2, "num_draws": 5, "tau": 0.8, "draw_method": "independent"}
    with pytest.raises(ConfigError, match=f"{name} is a setting of kind .*, and none is named .*set kind too"):
        parse_config(KeepConfig, {name: values[name]}, "here")
    kind = KINDS_WITH[name][0]
    assert parse_config(KeepConfig, {name: values[name], "kind": kind}, "here").kind == kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CaptureConfig(corpus={"path": "x"}, kk=3), r"CaptureConfig: unknown key 'kk' \(did you mean"),
        (lambda: CaptureConfig(corpus={"pth": "x"}), r"CaptureConfig:\n  'corpus.path' is missing"),
        (lambda: CaptureConfig(corpus=CorpusConfig(path="x"), k="many"), r"CaptureConfig: k: .*\(got 'many'\)"),
        (lambda: CaptureConfig(corpus=CorpusConfig(path="x", id_colum="a")), "CorpusConfig: unknown key 'id_colum'"),
        (lambda: Entropy(), r"share.* is missing.*For instance: share=0\.2$"),
        (lambda: BatchesConfig(context_tokens=0), "BatchesConfig: context_tokens: .*equal to 2 .got 0."),
        (lambda: CheckpointStudent(modle="x"), "CheckpointStudent:\n  'model' is missing"),
    ],
)
def test_a_call_in_python_ends_as_settings_of_a_file_do(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "pydantic" not in str(caught.value) and "--set" not in str(caught.value)


def test_a_token_in_a_call_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"CorpusConfig: path holds what looks like a password") as caught:
        CorpusConfig(path="https://me:hunter2hunter2@host/x.jsonl")
    assert "hunter2" not in str(caught.value)


def test_a_path_in_python_is_taken_and_recorded_as_text() -> None:
    assert CaptureConfig(corpus=CorpusConfig(path=Path("texts.jsonl"))).corpus.path == "texts.jsonl"
    assert TeacherConfig(model=Path("/models/m")).model == "/models/m"
    assert CaptureConfig(corpus={"path": Path("texts.jsonl")}).corpus.path == "texts.jsonl"


@pytest.mark.parametrize(
    ("rows", "way"),
    [
        (pa.table({"text": ["a"]}), r"Table is no path.*pyarrow\.parquet\.write_table\(rows"),
        (datasets.Dataset.from_dict({"text": ["a"] * 50}), r'^.*Dataset is no path.*rows\.save_to_disk\("rows"\)'),
        (
            SimpleNamespace(to_parquet=print),
            r'SimpleNamespace is no path.*rows\.to_parquet\("rows\.parquet"\)',
        ),  # pandas
        ([{"text": "a"}] * 1000, r"list is no path.*one JSON object a line.*\(got a list\)"),
        ((n for n in "ab"), "generator is no path.*one JSON object a line"),
    ],
)
def test_rows_in_memory_are_told_which_file_to_write(rows: object, way: str) -> None:
    with pytest.raises(ConfigError, match=way) as caught:
        CorpusConfig(path=rows)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400
