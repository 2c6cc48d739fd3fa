"""Arguments of the wrong type: every public function says so, before it does anything, and takes what is meant."""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from pydantic import BaseModel

import kdata
from kdata.calls import validated
from kdata.config import parse_config
from kdata.errors import ConfigError
from kdata.loader.batches import Batches, BatchesConfig
from kdata.selection.plan import Plan
from kdata.selection.ranked import Random
from kdata.trainer import parts
from kdata.trainer.config import TrainConfig
from kdata.trainer.parts import Collator, DistillationLoss, PackedRows, RowStream
from kdata.trainer.train import train

ROOT = Path(__file__).resolve().parents[2]
# What a public function takes as a value of ours: by the text of its annotation.
OURS = re.compile(r"\w*(Config|Step|Plan|Dataset|Path|Source|Collator|Objective)\b|list\[str\]|Sequence\[str\]")
NOT_OURS = {"Plan.__init__", "Row.__init__", "Dataset.index_ranges", "Dataset.shard_index"}  # called by code of ours
CHECKED = {  # by words in an annotation: values that no such parameter takes
    "Config": (3.5, "random", {"no_such_setting": 1}, ["random"]),
    "Step": (3.5, "random", {"method": "no such method"}, {"method": ["random"]}, {1: 2}, ["random"]),
    "Objective": (3.5, "forward_kl"),
    "list[str]": ([1.5], [Path("a")], "text", 3, {"a": 1}),
    "Sequence[str]": ([1.5], [Path("a")], "text", 3, {"a": 1}),
    "Sequence[AnyDataset]": ("a", [1.5], 3),
    "Plan": (1.5, [1.5]),
    "Dataset": (1.5, [1.5], {"a": 1}),
    "Path": (1.5, [1.5], {"a": 1}),
    "Source": (1.5, "a"),
    "Collator": (1.5, "rows"),
}


def documented() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of ours that the pages and the examples import."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("trainer/parts/*.md"), *ROOT.glob("examples/*.py")]
    for text in (file.read_text("utf-8") for file in files):
        for module, names in re.findall(r"^ *from (kdata\.[\w.]+) import ([\w, ]+)", text, re.MULTILINE):
            for name in re.findall(r"\w+", names):
                if inspect.isfunction(value := getattr(import_module(module), name)):
                    yield name, value


def public() -> dict[str, Callable[..., Any]]:
    """Functions and methods that are for users, by name: `kdata`, `kdata.trainer.parts`, and what the pages import."""
    functions = dict(documented())
    for module in (kdata, parts):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                functions[name] = value
            elif inspect.isclass(value) and not issubclass(value, BaseModel | BaseException):
                own = {key: one for key, one in inspect.getmembers(value) if key == "__init__" or key[0] != "_"}
                methods = {key: getattr(one, "__func__", one) for key, one in own.items() if inspect.isroutine(one)}
                functions |= {f"{name}.{key}": one for key, one in methods.items() if inspect.isfunction(one)}
    return {
        name: function
        for name, function in functions.items()
        if inspect.unwrap(function).__module__.startswith("kdata.") and name not in NOT_OURS
    }


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """Parameters that take something of ours, with their annotations."""
    named = inspect.signature(function).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = {one.name: str(one.annotation) for one in named if one.kind not in several}
    return {name: text for name, text in own.items() if OURS.search(text)}


CASES = [(name, parameter) for name, function in sorted(public().items()) for parameter in parameters(function)]


def test_the_walk_meets_the_functions() -> None:
    names = {name for name, _ in CASES}
    assert names >= {
        "capture",
        "select",
        "make_plan",
        "push",
        "verify",
        "train",
        "evaluate",
        "export_dataset",
        "attach_loss",
    }
    assert names >= {
        "RowStream.__init__",
        "PackedRows.__init__",
        "Dataset.index",
        "Plan.load",
        "DistillationLoss.__init__",
    }


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_a_wrong_argument_is_named(name: str, parameter: str) -> None:
    function = public()[name]
    annotation = parameters(function)[parameter]
    wrong = [object(), *next(values for word, values in CHECKED.items() if word in annotation)]
    if "None" not in annotation:
        wrong.append(None)
    needed = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
    for value in wrong:
        # The others are wrong, too, so that nothing is done where this one is taken; each has a line of its own.
        others = {one: object() for one in needed if one not in ("args", "kwargs")}
        with pytest.raises(ConfigError) as caught:
            function(**{**others, parameter: value})
        assert re.search(rf"^(\S+: | *){parameter}\b", str(caught.value), re.MULTILINE), str(caught.value)


def test_what_is_meant_is_taken(copied: Path) -> None:
    data = kdata.open(copied)
    half = kdata.select(data, Random(name="half", share=0.5))
    also = kdata.select(data, {"method": "random", "name": "also", "share": 0.5})
    assert also.ids == half.ids and also.info.parameters == half.info.parameters
    named = kdata.select(data, {"share": 0.5, "method": "random", "positions": {"rule": "entropy", "share": 0.2}})
    assert named.info.positions is not None and named.info.positions.rule == "entropy"
    for ids in (tuple(half.ids), np.array(half.ids), pl.Series(half.ids), pa.array(half.ids)):
        assert kdata.make_plan(data, "some", ids, method="x", parameters={}, repeats=[2] * len(ids)).ids == half.ids
    assert data.tokens(rows=range(2)).read_all() == data.tokens(rows=np.arange(2)).read_all()
    assert Plan.load(str(half.save(str(copied / "plans")))).ids == half.ids
    stream = RowStream(data, config={"context_tokens": 128, "batch_rows": 2, "seed": 3})
    assert stream.config == BatchesConfig(context_tokens=128, batch_rows=2, seed=3)
    assert DistillationLoss({"weights": {"jsd": 1.0}}, "ghost").objective.weights == {"jsd": 1.0}


class Named:
    """What `os.fspath` takes."""

    def __fspath__(self) -> str:
        return "folder"


@validated
def takes(
    *,
    whole: int = 0,
    number: float = 0.0,
    truth: bool = False,
    text: str = "",
    texts: list[str] = [],  # noqa: B006
    rows: Sequence[int] | np.ndarray | None = None,
    array: np.ndarray | None = None,
    file: Path | None = None,
    place: Path | str = "",
    maps: Iterable[Mapping[str, str]] = (),
    function: Callable[[int], int] = abs,
) -> Any:
    return next((value for value in (whole, number, truth, text, texts, rows, array, file, place, maps) if value), None)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("whole", True), ("whole", np.True_), ("whole", "3"), ("whole", b"3"), ("whole", 3.0), ("whole", Decimal(3)),
        ("number", True), ("number", "0.5"), ("number", b"1"), ("number", "nan"),
        ("truth", "no"), ("truth", "true"), ("truth", b"true"), ("truth", 1.0), ("truth", 2),
        ("text", b"a"), ("texts", {"a", "b"}), ("texts", frozenset("ab")), ("texts", [b"a"]), ("texts", np.array([b"a"])),
        ("rows", [True, False]), ("rows", ["1"]), ("rows", [1.5]), ("rows", {1, 2}), ("array", [True, 2]),
        ("file", "s3://bucket/out"), ("place", b"a"), ("maps", iter([{"a": 3}])), ("maps", "ab"), ("function", 3),
    ],
)  # fmt: skip
def test_nothing_becomes_another_value(parameter: str, value: Any) -> None:
    """A set has another order in every process, a URL as a path is a folder here, and True is no number of rows."""
    with pytest.raises(ConfigError, match=rf"^takes: {parameter}(\[.*)? is .* takes "):
        takes(**{parameter: value})


@pytest.mark.parametrize(
    ("parameter", "value", "read"),
    [
        ("whole", np.int64(2**53 + 1), 2**53 + 1),
        ("whole", np.uint64(2**63 + 1), 2**63 + 1),
        ("whole", torch.tensor(2**53 + 1), 2**53 + 1),
        ("number", np.float32(0.5), 0.5),
        ("number", 1, 1.0),
        ("truth", np.True_, True),
        ("text", np.str_("a"), "a"),
        ("texts", iter("ab"), ["a", "b"]),
        ("texts", {"a": 1, "b": 2}.keys(), ["a", "b"]),
        ("texts", deque("ab"), ["a", "b"]),
        ("texts", pa.chunked_array([["a"], ["b"]]), ["a", "b"]),
        ("rows", (np.int64(2**53 + 1), 1), [2**53 + 1, 1]),
        ("rows", pl.Series([3, 1]), [3, 1]),
        ("file", Named(), Path("folder")),
        ("place", Named(), Path("folder")),
        ("place", "s3://bucket/data", "s3://bucket/data"),
        ("maps", (one for one in [{"a": "b"}]), [{"a": "b"}]),
    ],
)
def test_what_means_the_same_is_read_exactly(parameter: str, value: Any, read: Any) -> None:
    result = takes(**{parameter: value})
    assert result == read and type(result) is type(read)


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), pl.Series([3, 1]), pa.array([3, 1]), range(3, 0, -2)])
def test_columns_and_tensors_are_arrays(rows: Any) -> None:
    assert validated_take(rows).tolist() == [3, 1]


@validated
def validated_take(rows: np.ndarray) -> np.ndarray:
    return rows


@validated
def validated_rows(rows: Sequence[int] | np.ndarray) -> Any:
    return rows


def test_an_array_of_rows_is_not_made_a_list() -> None:
    rows = np.arange(5)
    assert validated_rows(rows) is rows


@pytest.mark.parametrize(
    "call",
    [
        lambda: kdata.make_plan("D", "some", "x" * 10**6, method="x", parameters={}),
        lambda: kdata.make_plan("D", "some", [3] * 10**6, method="x", parameters={}),
        lambda: kdata.select("D", {"method": "random", "x" * 10**6: 1}),
        lambda: kdata.select("D", {"method": "x" * 10**6}),
        lambda: kdata.select("D", {"method": "random", **{f"key{n}": n for n in range(5000)}}),
        lambda: kdata.select("D", dict.fromkeys(map(str, range(10**5)))),
        lambda: kdata.open({f"key{n}": n for n in range(5000)}),
    ],
)
def test_a_large_wrong_value_does_not_fill_the_screen(call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert len(str(caught.value)) < 4000


def test_values_of_a_mapping_are_not_shown() -> None:
    """People put tokens there."""
    with pytest.raises(ConfigError, match=r"destination is \{'token': \.\.\.\} \(dict\)"):
        kdata.push("D", {"token": "a-secret-of-no-known-form"})


@pytest.mark.parametrize(
    ("model", "values", "key"),
    [
        (Random, {"share": True}, "share"),
        (Random, {"share": 0.5, "seed": True}, "seed"),
        (TrainConfig, {"steps": True}, "steps"),
        (TrainConfig, {"objective": {"weights": {"jsd": True}}}, "weights"),
        (TrainConfig, {"objective": {"taid_t": True}}, "taid_t"),
        (BatchesConfig, {"context_tokens": 64, "batch_rows": True}, "batch_rows"),
    ],
)
def test_settings_take_no_true_for_a_number(model: type[BaseModel], values: dict[str, Any], key: str) -> None:
    """`share: on` in YAML would choose every row."""
    for read in (lambda: model(**values), lambda: parse_config(model, values, "recipe")):
        with pytest.raises(ConfigError, match=rf"{key} takes a number, and True and False are none \(got"):
            read()


def test_settings_that_take_true_or_false_still_do() -> None:
    assert Random(share=0.5, by_domain=True).by_domain
    engine_args = {"enforce_eager": True}
    assert kdata.TeacherConfig(model="m", backend="vllm", engine_args=engine_args).engine_args == engine_args


def test_settings_read_whole_numbers_of_numpy_exactly() -> None:
    assert Random(share=0.5, seed=np.int64(2**53 + 1)).seed == 2**53 + 1


def test_wrong_values_of_the_right_type_are_errors_of_ours(captured: Path, tmp_path: Path) -> None:
    """Not numpy's or pyarrow's, and no other rows than were meant."""
    data = kdata.open(captured)
    ids, settings = data.index(["id"])["id"].to_pylist()[:2], BatchesConfig(context_tokens=128)
    for rows in (np.array([True, False]), [1.0], ["1"], [-1], [data.num_rows], [[0]]):
        with pytest.raises((kdata.ShapeError, kdata.OutOfRangeError)):
            Batches(data, rows, settings)
    with pytest.raises(ConfigError, match="rank 0 of 0"):
        Batches(data, None, settings, world_size=0)
    for number in (-1, len(data.manifest)):
        with pytest.raises(kdata.OutOfRangeError, match=f"there is no shard {number}"):
            data.shard(number)
    with pytest.raises(ConfigError, match="name each once"):
        data.index(["id", "id"])
    with pytest.raises(ConfigError, match="no place in the stream"):
        RowStream(data, config={"context_tokens": 128}).state_dict({"input_ids": 1})
    for repeats in ([1], [True, True], np.array([True, True]), ["1", "2"]):
        with pytest.raises((ConfigError, kdata.DataError), match="repeats"):
            kdata.make_plan(data, "some", ids, method="x", parameters={}, repeats=repeats)
    with pytest.raises(kdata.DataError, match="weights are numbers"):
        weights = [np.array([True]), np.array([True])]
        kdata.make_plan(data, "some", ids, method="x", parameters={}, positions=[[1], [1]], weights=weights)
    with pytest.raises(kdata.DataError, match="kept as JSON"):
        kdata.make_plan(data, "some", ids, method="x", parameters={"a": b"x"})
    plan = kdata.make_plan(data, "some", ids, method="x", parameters={"a": np.int64(3), "b": Path("c")})
    assert Plan.load(plan.save(tmp_path)).info.parameters == {"a": 3, "b": "c"}


def test_a_row_that_is_none_is_named_briefly(captured: Path) -> None:
    for rows in (list(range(10**5)), ["x" * 10**5]):
        with pytest.raises((kdata.ShapeError, kdata.OutOfRangeError)) as caught:
            kdata.open(captured)[rows]
        assert len(str(caught.value)) < 1000


def test_a_path_in_a_mapping_of_settings_is_its_text() -> None:
    @validated
    def capture(config: kdata.CaptureConfig) -> kdata.CaptureConfig:
        return config

    config = capture({"corpus": {"path": Path("a")}, "unit_tokens": np.int64(4)})
    assert config == kdata.CaptureConfig(corpus=kdata.CorpusConfig(path="a"), unit_tokens=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kdata.select("D", "random"),
            "select: config is 'random' (str); config takes Step or a mapping of its settings, for instance "
            "config={'method': 'random', 'share': 0.5}",
        ),
        (
            lambda: kdata.make_plan("D", "some", ["a", Path("b")], method="x", parameters={}),
            "make_plan: ids[1] is PosixPath('b') (PosixPath); ids takes a list (text each), for instance ids=['TEXT']",
        ),
        (
            lambda: kdata.make_plan("D", "some", "row-1", method="x", parameters={}),
            "make_plan: ids is 'row-1' (str); ids takes a list (text each), for instance ids=['row-1']",
        ),
        (
            lambda: kdata.merge(["D", 3], 1.5),
            "merge:\n  datasets[1] is 3 (int); datasets takes a list (Dataset or text or a path each), for instance "
            "datasets=['FOLDER']\n  target is 1.5 (float); target takes a path or text, for instance target='FOLDER'",
        ),
        (
            lambda: kdata.verify(None),
            "verify: dataset is None (NoneType); dataset takes Dataset or text or a path, for instance dataset='FOLDER'",
        ),
        (lambda: Collator("row"), "Collator: layout is 'row' (str); layout takes one of 'rows', 'flat', 'padded', for"),
        (
            lambda: PackedRows("D", items=1.5),
            "PackedRows: items is 1.5 (float); items takes a whole number or None, for",
        ),
        (
            lambda: RowStream("D", config={"context": 3}),
            "RowStream: config: BatchesConfig: unknown key 'context' (did you mean 'context_tokens'?); known here: ",
        ),
        (
            lambda: kdata.capture("D", {"corpus": "texts"}, {"model": 3}),
            "capture:\n  config: CaptureConfig: corpus: Input should be a valid dictionary or instance of CorpusConfig (got "
            "'texts')\n  teacher_config: TeacherConfig: model: Input should be a valid string (got 3)",
        ),
        (
            lambda: train({"step": 3}, 3, None, "out"),
            "train:\n  config: TrainConfig: unknown key 'step' (did you mean 'steps'?); known here: ",
        ),
    ],
)
def test_messages(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_missing_argument_is_told_as_python_does() -> None:
    with pytest.raises(TypeError, match=r"capture\(\) missing 2 required positional arguments"):
        kdata.capture("D")
    with pytest.raises(TypeError, match="unexpected keyword argument 'share'"):
        kdata.select("D", share=0.5)
