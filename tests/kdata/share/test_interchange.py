"""Import rows as the other tool's decoder reads them, count their errors, and export rows again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError, FormatError, MismatchError, MissingError, StorageError
from kdata.format.manifest import write_info, write_manifest
from kdata.format.schema import json_digest
from kdata.pipelines.cli.main import app
from kdata.share.card import write_card
from kdata.share.interchange import exporter
from kdata.share.interchange.distillkit import Compression, decode_logprobs, unpack
from kdata.share.interchange.exporter import export_dataset
from kdata.share.interchange.importer import ImportConfig, batches, import_dataset
from kdata.share.interchange.rows import ImportReport, as_ids
from kdata.share.interchange.source import PeerFile
from tests.fakes import VOCAB, digests, rows_of_text, run_capture, save_tokenizer, write_jsonl

PEERS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "peers"
needs_peers = pytest.mark.skipif(not PEERS.is_dir(), reason="the files of other tools are not here")


def imported(source: Path, root: Path, format: str, **settings: Any) -> tuple[kdata.Dataset, ImportReport]:
    return import_dataset(source, root, ImportConfig(format=format, **settings))


def entries_of(sequence: kdata.Sequences, t: int) -> tuple[np.ndarray, np.ndarray]:
    span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
    return sequence.entry_ids[span], sequence.entry_logprobs[span]


# ------------------------------------------------------------------------------------------------- DistillKit


@needs_peers
@pytest.mark.parametrize(
    ("setting", "over_one", "rising"), [("qwen3-style", 0, 2), ("recommended", 15, 875), ("residual-bins", 1, 2821)]
)
def test_distillkit_s_files_are_read_as_its_own_decoder_reads_them(
    tmp_path: Path, setting: str, over_one: int, rising: int
) -> None:
    """Ids equal; log-probabilities within float32 rounding of a sum of up to six terms; errors counted, not repaired."""
    folder = PEERS / f"distillkit-{setting}"
    dataset, report = imported(folder, tmp_path / "d", "distillkit")
    expected = np.load(folder / "expected.npz")
    tokens = pq.read_table(folder / "data_0.parquet", columns=["input_ids"])["input_ids"].to_pylist()
    assert dataset.num_rows == len(tokens) == 24
    sums = []
    for row, sequence in enumerate(dataset):
        ids, logprobs = expected[f"ids_{row}"], expected[f"logprobs_{row}"]
        np.testing.assert_array_equal(sequence.token_ids, tokens[row])
        assert sequence.num_kept[0] == 0 and (sequence.num_kept[1:] == ids.shape[1]).all()
        np.testing.assert_array_equal(sequence.entry_ids, ids.reshape(-1))
        np.testing.assert_allclose(sequence.entry_logprobs, logprobs.reshape(-1), rtol=1e-6, atol=1e-6)
        sums.append(np.exp(sequence.entry_logprobs.astype(np.float64)).reshape(ids.shape).sum(1))
    assert int((np.concatenate(sums) > 1).sum()) == report.sums_over_one == over_one
    assert report.rising == rising
    assert report.max_sum == pytest.approx(np.concatenate(sums).max())
    errors = [entry.codec_error for entry in dataset.manifest]
    assert sum(e.sums_over_one for e in errors if e) == over_one and max(e.max_nats for e in errors if e) == 0
    assert any("unscaled axis" in note for note in report.notes) == (setting == "recommended")
    assert verify(dataset, deep=True) == []
    card = write_card(dataset).read_text()
    assert ("15 positions sum to more than 1" in card) == (over_one == 15)


def save_distillkit(folder: Path, logprobs: list[np.ndarray], ids: list[np.ndarray], **config: Any) -> Path:
    """Files as DistillKit writes them, of exact float32 values and ids of 9 bits."""
    folder.mkdir()
    k = ids[0].shape[1]
    settings = {"d": VOCAB, "k": k, "exact_k": k, "residual_bins": [], "delta_encoding": False, **config}
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    rows = {
        "input_ids": [list(range(2, 3 + len(x))) for x in ids],
        "compressed_logprobs": [x.astype("<f4").view(np.uint8).tolist() for x in logprobs],
        "bytepacked_indices": [pack(x, 9).tolist() for x in ids],
    }
    pq.write_table(pa.table(rows), folder / "data_0.parquet")
    return folder


def pack(numbers_PN: np.ndarray, bits: int) -> np.ndarray:
    places = np.arange(bits)[::-1].astype(np.uint64)
    each = (numbers_PN[:, :, None].astype(np.uint64) >> places) & np.uint64(1)
    return np.packbits(each.astype(np.uint8).reshape(len(numbers_PN), -1), axis=1)


@given(data=st.data(), bits=st.integers(1, 64), count=st.integers(1, 20))
def test_numbers_of_any_width_unpack(data: st.DataObject, bits: int, count: int) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    grid = np.array([numbers], np.uint64)
    np.testing.assert_array_equal(unpack(pack(grid, bits), bits, count), grid)


def test_a_curve_and_its_residuals_worked_out_by_hand() -> None:
    """exact -1, -2 (float16); curve 3 - t + sqrt t at t = 0, 1, 2; residuals of 2 bits, scale 0.5: -2, 1; none."""
    config = Compression.model_validate(
        {
            "d": 100,
            "k": 5,
            "exact_k": 2,
            "exact_dtype": "float16",
            "polynomial_terms": [0, 1, "sqrt"],
            "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": 2, "num_elements": 2}],
            "delta_encoding": False,
        }
    )
    half = (np.array([0.5], np.float32).view(np.uint32) >> 16).astype("<u2")
    packed = np.concatenate(
        [
            np.array([-1, -2], "<f2").view(np.uint8),
            np.array([3, -1, 1], "<f4").view(np.uint8),
            half.view(np.uint8),
            np.array([0b00_11_0000], np.uint8),
        ]
    )[None]
    assert packed.shape[1] == config.num_bytes
    np.testing.assert_allclose(
        decode_logprobs(packed, config), [[-1, -2, 3 - 1, 2 + 1 + 0.5, 3 - 2 + np.sqrt(2)]], rtol=1e-6
    )
    delta = config.model_copy(update={"delta_encoding": True})
    expected = np.cumsum(decode_logprobs(packed, config), 1).astype(np.float16)
    np.testing.assert_array_equal(decode_logprobs(packed, delta), expected)


def test_one_bit_residuals_are_minus_and_plus_one() -> None:
    config = Compression.model_validate(
        {
            "d": 100,
            "k": 3,
            "exact_k": 0,
            "exact_dtype": "float32",
            "residual_bins": [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 3}],
            "delta_encoding": False,
        }
    )
    packed = np.concatenate([np.array([0.25], "<f4").view(np.uint8), np.array([0b10100000], np.uint8)])[None]
    np.testing.assert_array_equal(decode_logprobs(packed, config), [[0.25, -0.25, 0.25]])


def test_what_distillkit_lacks_is_marked_absent_and_training_needs_a_setting(tmp_path: Path) -> None:
    from kdata.trainer.objective_config import ObjectiveConfig, resolve_tail

    logprobs = np.log(np.array([[0.5, 0.25], [0.7, 0.1], [0.6, 0.5]]))
    source = save_distillkit(tmp_path / "s", [logprobs], [np.array([[5, 6], [7, 299], [1, 0]])])
    dataset, report = imported(source, tmp_path / "d", "distillkit")
    [sequence] = dataset
    assert np.isnan(sequence.log_tail).all() and np.isnan(sequence.logprob).all() and np.isnan(sequence.entropy).all()
    assert (sequence.rank == 0).all() and sequence.target_mask.tolist() == [False, True, True, True]
    assert dataset.index()["nll"].to_pylist() == [None] == dataset.index()["mean_entropy"].to_pylist()
    assert dataset.info.tail == "absent" and dataset.info.tokenizer.hash == "unknown"
    assert report.sums_over_one == 1 and report.max_sum == pytest.approx(1.1)
    for tail in ("auto", "ghost", "draws"):
        with pytest.raises(ConfigError, match="imported from a format that does not hold"):
            resolve_tail(ObjectiveConfig(tail=tail), "absent")
    assert resolve_tail(ObjectiveConfig(tail="renormalise"), "absent") == "renormalise"


def test_a_student_is_not_measured_on_an_imported_dataset(tmp_path: Path, llama_dir: Path) -> None:
    from kdata.trainer.evaluate import evaluate

    source = save_distillkit(tmp_path / "s", [np.log([[0.5, 0.25]])], [np.array([[5, 6]])])
    imported(source, tmp_path / "d", "distillkit")
    with pytest.raises(ConfigError, match="without the tail"):
        evaluate(llama_dir, tmp_path / "d")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"k": 3, "exact_k": 3}, "8 bytes at a position, but the compression YAML means 12"),
        ({"d": 2**20}, "bytepacked_indices has 3 bytes at a position, but the compression YAML means 5"),
        ({"exact_dtype": "float16"}, "8 bytes at a position, but the compression YAML means 4"),
        ({"polynomial_term": [1]}, "did you mean 'polynomial_terms'"),
    ],
)
def test_a_yaml_of_other_files_is_refused(tmp_path: Path, config: dict[str, Any], error: str) -> None:
    source = save_distillkit(tmp_path / "s", [np.log([[0.5, 0.25]])], [np.array([[5, 6]])], **config)
    with pytest.raises((DataError, ConfigError), match=error):
        imported(source, tmp_path / "d", "distillkit")
    (source / "compression_config.yaml").unlink()
    with pytest.raises(MissingError, match="--compression"):
        imported(source, tmp_path / "d", "distillkit")


# ------------------------------------------------------------------------------------------- alignment and faults


def plain_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": "a",
        "domain": "x",
        "text": "hello",
        "input_ids": [3, 4, 5],
        "topk_ids": [[], [7, 8], [9]],
        "topk_logprobs": [[], [-0.5, -2.0], [-0.25]],
    }
    return row | changes


def test_a_column_that_only_later_rows_have_is_not_lost(tmp_path: Path) -> None:
    masked = plain_row(id="b", target_mask=[False, False, True])
    source = write_jsonl(tmp_path / "rows.jsonl", [plain_row(), masked, plain_row(id="c")])
    dataset, _ = imported(source, tmp_path / "d", "plain", vocab_size=10)
    assert dataset.sql("select num_target_tokens as n from rows order by id")["n"].to_pylist() == [2, 1, 2]
    assert dataset[1].target_mask.tolist() == [False, False, True]
    short = write_jsonl(tmp_path / "short.jsonl", [plain_row(), plain_row(id="b", target_mask=[True])])
    dataset, _ = imported(short, tmp_path / "e", "plain", vocab_size=10)
    [reject] = dataset.sql("select id, reason, detail from rejects").to_pylist()
    assert dataset.num_rows == 1 and (reject["id"], reject["reason"]) == ("b", "misaligned")
    assert "have different lengths" in reject["detail"]
    with pytest.raises(DataError, match="have different lengths"):
        imported(write_jsonl(short, [plain_row(target_mask=[True])]), tmp_path / "f", "plain", vocab_size=10)


def test_plain_lists_with_and_after(tmp_path: Path) -> None:
    here = write_jsonl(tmp_path / "with.jsonl", [plain_row()])
    later = plain_row(topk_ids=[[7, 8], [9], [1]], topk_logprobs=[[-0.5, -2.0], [-0.25], [-1.0]])
    after = write_jsonl(tmp_path / "after.jsonl", [later])
    one, _ = imported(here, tmp_path / "1", "plain", vocab_size=10)
    two, report = imported(after, tmp_path / "2", "plain", vocab_size=10, aligned="after")
    assert report.beyond_end == 1
    for dataset in (one, two):
        assert dataset[0].num_kept.tolist() == [0, 2, 1]
        assert dataset[0].entry_ids.tolist() == [7, 8, 9]
        assert dataset[0].entry_logprobs.tolist() == [-0.5, -2.0, -0.25]
        assert dataset.index().select(["id", "domain", "text"]).to_pylist() == [
            {"id": "a", "domain": "x", "text": "hello"}
        ]
    with pytest.raises(DataError, match=r"nothing predicts it.*--aligned after"):
        imported(after, tmp_path / "3", "plain", vocab_size=10)


def test_rows_that_cannot_be_used_are_rejected_with_a_reason(tmp_path: Path) -> None:
    rows = [
        plain_row(),
        plain_row(id="big", topk_ids=[[], [7, 80], [9]]),
        plain_row(id="twice", topk_ids=[[], [7, 7], [9]]),
        plain_row(id="nan", topk_logprobs=[[], [-0.5, None], [-0.25]]),
        plain_row(id="short", input_ids=[3]),
        plain_row(id="long", input_ids=[3, 4]),
        plain_row(id="padded", topk_logprobs=[[], [-0.5, float("-inf")], [-0.25]]),
        plain_row(id="masked", target_mask=[False, False, True]),
    ]
    table = pa.Table.from_pylist([{"target_mask": [True] * len(r["input_ids"]), **r} for r in rows])
    pq.write_table(table, tmp_path / "rows.parquet")
    dataset, report = imported(tmp_path / "rows.parquet", tmp_path / "d", "plain", vocab_size=10)
    assert dataset.index(["id"])["id"].to_pylist() == ["a", "padded", "masked"]
    assert dataset.rejected() == {"vocabulary": 1, "twice": 1, "not_finite": 1, "no_targets": 1, "misaligned": 1}
    assert dataset.sql("select id, reason from rejects").num_rows == 5
    assert report.padding_entries == 1 and dataset[1].num_kept.tolist() == [0, 1, 1]
    assert dataset[2].target_mask.tolist() == [False, False, True]
    assert report.rows == 3 and report.positions == 6


def test_a_line_that_cannot_be_used_is_a_reject_and_its_neighbours_are_imported(tmp_path: Path) -> None:
    broken = {
        "not_json": ['{"id": "cut", ', "[1, 2]", "null", "[" * 100_000],
        "form": [
            "{}",
            json.dumps(plain_row(id="mixed", input_ids=["a", 2])),
            json.dumps(plain_row(id="huge", input_ids=[10**30])),
        ],
        "misaligned": [
            json.dumps(plain_row(id="text ids", topk_ids=[[], ["q"], ["r"]])),
            json.dumps(plain_row(id="text numbers", topk_logprobs=[[], ["-0.5", "-0.6"], ["-0.7"]])),
            json.dumps(plain_row(id="text mask", target_mask=["false", "true", "true"])),
            json.dumps(plain_row(id="two", target_mask=[0, 2, 1])),
            json.dumps(plain_row(id="no list", input_ids="abc")),
            json.dumps({"id": "alone"}),
        ],
    }  # fmt: skip
    lines = [line for some in broken.values() for line in some]
    good = [json.dumps(plain_row(id=f"good {n}")) for n in range(len(lines) + 1)]
    text = "\n".join([good[0], *(f"{bad}\n{fine}" for bad, fine in zip(lines, good[1:], strict=True))])
    (tmp_path / "rows.jsonl").write_text(text)
    dataset, _ = imported(tmp_path / "rows.jsonl", tmp_path / "d", "plain", vocab_size=10)
    assert dataset.index(["id"])["id"].to_pylist() == [f"good {n}" for n in range(len(lines) + 1)]
    assert dataset.rejected() == {reason: len(some) for reason, some in broken.items()}
    details = dataset.sql("select detail from rejects where reason = 'not_json' order by id")["detail"].to_pylist()
    assert details[0].startswith("line 2 of rows.jsonl is not JSON")
    (tmp_path / "none.jsonl").write_text("no JSON\nat all\n")
    with pytest.raises(DataError, match="not one row could be imported"):
        imported(tmp_path / "none.jsonl", tmp_path / "e", "plain", vocab_size=10)


def test_the_report_counts_the_rows_that_are_in_the_dataset(tmp_path: Path) -> None:
    """Also where a row turns out to be a reject after it was counted, and where an earlier run put it aside."""
    over = [[], [-0.1, -0.2], [-0.25]]
    padded = plain_row(id="padded", input_ids=[3, 7, 99], topk_logprobs=[[], [-0.5, float("-inf")], [-0.25]])
    first = [plain_row(), plain_row(id="b", topk_logprobs=over)]
    second = [plain_row(id="b", topk_logprobs=over), plain_row(id="c"), plain_row(id="c", topk_logprobs=over), padded]
    for name, rows in (("one", first), ("two", second)):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    imported(tmp_path / "one.parquet", tmp_path / "d", "plain", vocab_size=10, name="one")
    for _ in range(2):
        dataset, report = imported(tmp_path / "two.parquet", tmp_path / "d", "plain", vocab_size=10, name="two")
        assert dataset.rejected(["two"]) == {"id_twice": 2, "vocabulary": 1}
        assert dataset.index(["id"])["id"].to_pylist() == ["a", "b", "c"]
        assert (report.rows, report.tokens, report.positions, report.entries) == (1, 3, 2, 3)
        assert (report.sums_over_one, report.padding_entries) == (0, 0)


def test_ids_that_32_bits_do_not_hold_do_not_become_others(tmp_path: Path) -> None:
    """2**32 + 7 is not 7, 7.5 is not 7, and null is no id."""
    rows = [
        plain_row(),
        plain_row(id="kept", topk_ids=[[], [2**32 + 7, 8], [9]]),
        plain_row(id="token", input_ids=[3, 2**32 + 7, 9]),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    dataset, _ = imported(tmp_path / "rows.parquet", tmp_path / "d", "plain", vocab_size=10)
    assert dataset.index(["id"])["id"].to_pylist() == ["a"] and dataset.rejected() == {"vocabulary": 2}
    assert as_ids(pa.array([7, 2**32 + 7, -1, None])).tolist() == [7, -1, -1, -1]
    assert as_ids(pa.array([7.0, 7.5, float("nan"), 3e9])).tolist() == [7, -1, -1, -1]
    assert as_ids(pa.nulls(1)).tolist() == [-1]


def test_logarithms_to_base_two_are_refused_unless_they_are_said_to_be_natural(tmp_path: Path) -> None:
    """They sum to less than natural ones, so no sum above 1 shows them."""
    logprobs_PV = np.log(np.random.default_rng(0).dirichlet(np.full(10, 0.4), size=300).clip(1e-6))
    lists = [[], *logprobs_PV[:, :8].tolist()]
    row = plain_row(input_ids=[3] * 301, topk_ids=[[], *[list(range(8))] * 300], topk_logprobs=lists)
    _, report = imported(write_jsonl(tmp_path / "e.jsonl", [row]), tmp_path / "e", "plain", vocab_size=10)
    assert report.positions == 300
    two = write_jsonl(tmp_path / "two.jsonl", [{**row, "topk_logprobs": [[x / np.log(2) for x in y] for y in lists]}])
    with pytest.raises(DataError, match=r"base 2.* of 300 positions sum to about 1, .*--values logprobs"):
        imported(two, tmp_path / "two", "plain", vocab_size=10)
    dataset, _ = imported(two, tmp_path / "two", "plain", vocab_size=10, values="logprobs")
    assert dataset.num_rows == 1


@pytest.mark.parametrize("version", [1, 2])
def test_logarithms_to_base_two_in_axolotl_s_files_are_noticed(tmp_path: Path, version: int) -> None:
    logprobs_PV = np.log(np.random.default_rng(0).dirichlet(np.full(10, 0.4), size=300).clip(1e-6))[:, :8]

    def rows_to(base: float) -> list[dict[str, Any]]:
        lists, ids = (logprobs_PV / np.log(base)).tolist(), [list(range(8))] * 300
        if version == 2:
            return [{"id": "a", "input_ids": [3] * 301, "logprobs": lists, "target_token_ids": ids}]
        named = [[{"token": f"token_id:{n}", "logprob": x} for n, x in enumerate(own)] for own in lists]
        return [{"id": "a", "input_ids": [3] * 301, "kd": named}]

    natural, two = (write_jsonl(tmp_path / f"{base}.jsonl", rows_to(base)) for base in (np.e, 2.0))
    assert imported(natural, tmp_path / "natural", "axolotl", vocab_size=10)[1].positions == 300
    with pytest.raises(DataError, match=r"base 2.* of 300 positions sum to about 1, .*--values logprobs"):
        imported(two, tmp_path / "two", "axolotl", vocab_size=10)
    assert imported(two, tmp_path / "two", "axolotl", vocab_size=10, values="logprobs")[1].positions == 300


@pytest.mark.parametrize(("format", "values"), [("axolotl", "probs"), ("nemo", "logprobs"), ("distillkit", "logits")])
def test_a_format_that_says_what_its_numbers_are_is_told_nothing_else(tmp_path: Path, format: str, values: str) -> None:
    with pytest.raises(ConfigError, match=f"values='{values}' is for plain lists; the format {format} says"):
        imported(tmp_path / "none", tmp_path / "d", format, vocab_size=10, values=values)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _flat(rng: np.random.Generator) -> np.ndarray:
    return np.sort(_softmax(rng.normal(0, 0.3, (400, 1024))), -1)[:, :-9:-1]


def _certain(rng: np.random.Generator) -> np.ndarray:
    rest = rng.uniform(1e-7, 1e-6, (400, 3))
    return np.concatenate([1 - 3e-6 - rest.sum(-1, keepdims=True), rest], -1)


def _language(rng: np.random.Generator) -> np.ndarray:
    scale = rng.uniform(0.5, 6, (400, 1))  # from unsure to certain, as positions of a text are
    return np.sort(_softmax(scale * rng.normal(0, 1, (400, 500))), -1)[:, :-9:-1]


@pytest.mark.parametrize("column", ["topk_logprobs", "topk_probs"])
@pytest.mark.parametrize("lists", [_flat, _certain, _language])
@pytest.mark.parametrize("seed", range(3))
def test_natural_lists_of_any_teacher_are_taken(
    tmp_path: Path, lists: Callable[[np.random.Generator], np.ndarray], column: str, seed: int
) -> None:
    """Those of an unsure teacher hold little of the probability, those of a certain one all of it."""
    probs_PK = lists(np.random.default_rng(seed))
    numbers = np.log(probs_PK) if column == "topk_logprobs" else probs_PK
    ids = [list(range(probs_PK.shape[1]))] * len(probs_PK)
    row = plain_row(input_ids=[3] * (len(ids) + 1), topk_ids=[[], *ids])
    row = {key: value for key, value in row.items() if key != "topk_logprobs"} | {column: [[], *numbers.tolist()]}
    _, report = imported(write_jsonl(tmp_path / "e.jsonl", [row]), tmp_path / "e", "plain", vocab_size=10)
    assert report.positions == len(ids)


def test_nothing_is_written_before_the_base_of_logarithms_shows(tmp_path: Path) -> None:
    """Answers of one token: each row is a unit, and has one list."""
    probs_PK = _language(np.random.default_rng(0))[:300]
    two = [
        plain_row(id=str(n), input_ids=[3, 3], topk_ids=[[], list(range(8))], topk_logprobs=[[], np.log2(p).tolist()])
        for n, p in enumerate(probs_PK)
    ]
    rows = write_jsonl(tmp_path / "two.jsonl", two)
    with pytest.raises(DataError, match="base 2"):
        imported(rows, tmp_path / "d", "plain", vocab_size=10, unit_tokens=50)
    assert not list((tmp_path / "d").rglob("*.arrow"))


def test_a_file_in_utf_16_is_refused(tmp_path: Path) -> None:
    """Every second line of it could be read, as the line's end is half of a character."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [plain_row(id=name) for name in "abcd"])
    rows.write_bytes(rows.read_text().encode("utf-16"))
    with pytest.raises(DataError, match=r"line 1 of rows.jsonl is in UTF-16; convert"):
        imported(rows, tmp_path / "d", "plain", vocab_size=10)


def test_sums_above_one_are_kept_masked_or_refused(tmp_path: Path) -> None:
    over = plain_row(topk_logprobs=[[], [-0.1, -0.2], [-0.25]])
    source = write_jsonl(tmp_path / "rows.jsonl", [over, plain_row(id="b")])
    kept, report = imported(source, tmp_path / "keep", "plain", vocab_size=10)
    assert report.sums_over_one == 1 and kept[0].num_kept.tolist() == [0, 2, 1]
    assert np.isclose(kept[0].entry_logprobs, [-0.1, -0.2, -0.25]).all()
    assert "1 (25.00%)" in report.lines("keep")[1] and "kept as they are" in report.lines("keep")[1]
    masked, report = imported(source, tmp_path / "mask", "plain", vocab_size=10, over_one="mask")
    assert report.sums_over_one == 1 and masked[0].num_kept.tolist() == [0, 0, 1]
    assert masked[0].target_mask.tolist() == [False, False, True]
    with pytest.raises(DataError, match=r"'a': probabilities at 1 positions sum to more than 1 .*--over-one"):
        imported(source, tmp_path / "refuse", "plain", vocab_size=10, over_one="refuse")


def test_logits_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [plain_row(topk_logprobs=[[], [9.0, 7.0], [8.0]])])
    with pytest.raises(DataError, match="not natural log-probabilities"):
        imported(source, tmp_path / "d", "plain", vocab_size=10)


@pytest.mark.parametrize(
    ("row", "format", "error"),
    [
        ({"input_ids": [1, 2]}, "plain", "no column 'topk_ids'"),
        ({"input_ids": [1, 2]}, "distillkit", "compression_config.yaml does not exist"),
        ({"logprobs": [[0.0]]}, "axolotl", "no column 'input_ids'"),
        ({"input_ids": [1, 2]}, "axolotl", "none of the columns .* holds axolotl's entries"),
        (
            {"input_ids": [1, 2], "lp": [[{"token": "Hi", "logprob": -1.0}]]},
            "axolotl",
            "return-tokens-as-token-ids",
        ),
        (plain_row(topk_ids=[[], [7], [9]]), "plain", "have different lengths"),
        (plain_row(topk_ids=[1, 2, 3]), "plain", "lists of lists are needed"),
    ],
)
def test_other_columns_are_refused_by_name(tmp_path: Path, row: dict[str, Any], format: str, error: str) -> None:
    with pytest.raises((DataError, MissingError), match=error):
        imported(write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "d", format, vocab_size=10)


def test_missing_and_unreadable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        imported(tmp_path / "no", tmp_path / "d", "plain", vocab_size=10)
    (tmp_path / "bad.jsonl").write_text("{nonsense\n")
    with pytest.raises(DataError, match=r"line 1 of bad.jsonl is not JSON"):
        imported(tmp_path / "bad.jsonl", tmp_path / "d", "plain", vocab_size=10)
    with pytest.raises(ConfigError, match="--vocab-size"):
        imported(write_jsonl(tmp_path / "rows.jsonl", [plain_row()]), tmp_path / "e", "plain")


def test_an_import_continues_where_it_stopped_and_refuses_another_source(tmp_path: Path) -> None:
    rows = [plain_row(id=f"r{n}", topk_ids=[[], [n % 10, (n + 1) % 10], [n % 7]]) for n in range(40)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    whole, _ = imported(source, tmp_path / "whole", "plain", vocab_size=10, unit_tokens=12)
    assert len(whole.manifest) == 10
    from kdata.check.repair import repair

    imported(source, tmp_path / "again", "plain", vocab_size=10, unit_tokens=12)
    (tmp_path / "again/data/import-00003.arrow").unlink()
    assert repair(tmp_path / "again").units == {"import": [3]}
    imported(source, tmp_path / "again", "plain", vocab_size=10, unit_tokens=12)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")
    other = write_jsonl(tmp_path / "other.jsonl", rows[:30])
    with pytest.raises(MismatchError, match="sha256"):
        imported(other, tmp_path / "whole", "plain", vocab_size=10, unit_tokens=12)


def test_a_tokenizer_adds_text_and_bytes(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [plain_row(text=None, input_ids=[0, 84, 105])])
    dataset, _ = imported(source, tmp_path / "d", "plain", tokenizer=str(tokenizer_dir))
    [row] = dataset.index().to_pylist()
    assert row["text"] and "<s>" not in row["text"] and row["num_bytes"] == len(row["text"].encode())
    assert dataset.info.vocab_size == VOCAB and dataset.tokenizer_dir is not None
    assert len(dataset.info.tokenizer.hash) == 64
    assert verify(dataset, deep=True) == []


# ---------------------------------------------------------------------------------------------------- axolotl


@needs_peers
def test_axolotl_s_two_layouts_give_the_same_rows(tmp_path: Path) -> None:
    one, report = imported(PEERS / "axolotl-v1.parquet", tmp_path / "1", "axolotl", vocab_size=8192)
    two, _ = imported(PEERS / "axolotl-v2.parquet", tmp_path / "2", "axolotl", vocab_size=8192)
    raw = pq.read_table(PEERS / "axolotl-v2.parquet").to_pylist()
    exact = np.load(PEERS / "distillkit-qwen3-style" / "expected.npz")
    assert report.positions == 2829 and report.sums_over_one == 0
    for row, (a, b) in enumerate(zip(one, two, strict=True)):
        np.testing.assert_array_equal(a.entry_ids, b.entry_ids)
        np.testing.assert_array_equal(a.entry_logprobs, b.entry_logprobs)
        np.testing.assert_array_equal(a.entry_ids.reshape(-1, 16), raw[row]["target_token_ids"])
        np.testing.assert_allclose(a.entry_logprobs.reshape(-1, 16), raw[row]["logprobs"], rtol=1e-7)
        np.testing.assert_array_equal(a.entry_ids.reshape(-1, 16), exact[f"ids_{row}"][:, :16])


def test_axolotl_s_lists_are_aligned_with_the_last_token(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3, 4], "logprobs": [[-0.5], [-0.25]], "target_token_ids": [[7], [8]]}
    dataset, _ = imported(write_jsonl(tmp_path / "r.jsonl", [row]), tmp_path / "d", "axolotl", vocab_size=10)
    assert dataset[0].num_kept.tolist() == [0, 0, 1, 1] and dataset[0].entry_ids.tolist() == [7, 8]
    padded = {"input_ids": [1, 2], "lp": [None, [{"token": "token_id:4", "logprob": -1.0}]]}
    dataset, _ = imported(write_jsonl(tmp_path / "p.jsonl", [padded]), tmp_path / "e", "axolotl", vocab_size=10)
    assert dataset[0].num_kept.tolist() == [0, 1] and dataset[0].entry_ids.tolist() == [4]


# ----------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("kind", ["topk", "hybrid", "threshold"])
@pytest.mark.parametrize("form", ["plain", "axolotl 1", "axolotl 2"])
def test_exported_rows_are_imported_again_unchanged(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, kind: str, form: str
) -> None:
    """Ids equal, log-weights to float32; what is lost is said."""
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, kind=kind)
    format, _, version = form.partition(" ")
    lost = export_dataset(dataset, tmp_path / "out.parquet", format, version=int(version or 2))
    assert any("mass of the rest" in line for line in lost) == (kind == "topk")
    assert any("which are draws" in line for line in lost) == (kind != "topk")
    back, _ = imported(tmp_path / "out.parquet", tmp_path / "back", format, tokenizer=str(tokenizer_dir))
    assert back.index(["id", "domain", "content_hash"]) == dataset.index(["id", "domain", "content_hash"])
    for before, after in zip(dataset, back, strict=True):
        np.testing.assert_array_equal(before.num_kept, after.num_kept)
        np.testing.assert_array_equal(before.target_mask, after.target_mask)
        for t in range(len(before.token_ids)):
            ids, logprobs = entries_of(before, t)
            order = np.argsort(-logprobs, kind="stable")
            own_ids, own = entries_of(after, t)
            np.testing.assert_array_equal(own_ids, ids[order])
            np.testing.assert_array_equal(own, logprobs[order])
    export_dataset(back, tmp_path / "again.parquet", format, version=int(version or 2))
    assert pq.read_table(tmp_path / "again.parquet").drop_columns("text" if format == "plain" else []) == pq.read_table(
        tmp_path / "out.parquet"
    ).drop_columns("text" if format == "plain" else [])


def test_export_refuses_an_existing_file_and_an_unknown_version(captured: Path, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export_dataset(kdata.open(captured), tmp_path / "x.parquet", "plain")
    with pytest.raises(ConfigError, match="versions 1 and 2"):
        export_dataset(kdata.open(captured), tmp_path / "y.parquet", "axolotl", version=3)


def test_the_commands(captured: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    result = run(app, ["export", str(captured), str(tmp_path / "x.parquet")])
    assert result.exit_code == 0 and "not in it:" in result.output and "the entropy" in result.output
    arguments = ["import", str(tmp_path / "x.parquet"), str(tmp_path / "d"), "--format", "plain", "--vocab-size", "300"]
    result = run(app, arguments)
    assert result.exit_code == 0 and "sum to more than 1: 0 (0.00%)" in result.output
    assert "marked absent: the mass of the rest" in result.output
    bad = run(app, [*arguments[:-4], "--format", "nemon"])
    assert isinstance(bad.exception, ConfigError) and "format" in str(bad.exception)


def test_no_other_writer_may_store_sums_above_one(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    """The relaxed check belongs to the codec `verbatim`; a reader that does not know it refuses by name."""
    source = save_distillkit(tmp_path / "s", [np.log([[0.9, 0.25]])], [np.array([[5, 6]])])
    dataset, _ = imported(source, tmp_path / "d", "distillkit")
    assert dataset.info.codec.id == "verbatim"
    newer = dataset.info.model_copy(update={"codec": dataset.info.codec.model_copy(update={"version": 2})})
    newer = newer.model_copy(update={"identity_digest": json_digest(newer.identity())})
    write_info(dataset.path, newer)
    lines = [entry.model_copy(update={"identity_digest": newer.identity_digest}) for entry in dataset.manifest]
    write_manifest(dataset.path, lines)
    with pytest.raises(FormatError, match="reads up to 1"):
        kdata.open(dataset.path)[0]


def test_a_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([[1, 2]]), pa.array([[3, 4]])], names=["input_ids", "input_ids"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has the column 'input_ids' twice; leave one out"):
        list(batches([PeerFile.of(tmp_path / "rows.parquet")]))


def test_the_page_of_an_export_is_there_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the file got its name would leave it without its page for ever: what exists is not exported again."""
    write_jsonl(tmp_path / "rows.jsonl", rows_of_text(3))
    save_tokenizer(tmp_path / "tokenizer")
    dataset = run_capture(tmp_path / "d", tmp_path / "rows.jsonl", tmp_path / "tokenizer")
    pages = []

    def settle(temporary: Path, target: Path) -> None:
        pages.append(target.with_name("x.parquet.README.md").read_text())
        raise StorageError("no room")

    monkeypatch.setattr(exporter, "settle", settle)
    with pytest.raises(StorageError):
        export_dataset(dataset, tmp_path / "x.parquet", "plain")
    assert "Written by `kdata export" in pages[0] and not list(tmp_path.glob("x.parquet*[!k]"))
