"""Layouts of other tools as their own code writes and reads them, wherever the files are."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError, MissingError
from kdata.share.interchange import importer
from kdata.share.interchange.exporter import export_dataset
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.share.interchange.megatron import export_megatron
from kdata.share.interchange.plain import kind_of
from kdata.store.writer import Writer
from tests.fakes import VOCAB, digests, write_jsonl
from tests.hub_server import HubServer
from tests.kdata.share.test_interchange import save_distillkit

RNG = np.random.default_rng(0)


def imported(source: Path | str, root: Path, format: str, **settings: Any) -> kdata.Dataset:
    return import_dataset(source, root, ImportConfig(format=format, **settings))[0]


def lists_of(dataset: kdata.Dataset, row: int) -> list[dict[int, float]]:
    """Entries of each token of a row."""
    s = dataset[row]
    ends = np.cumsum(s.num_kept)
    return [
        dict(zip(s.entry_ids[b - n : b].tolist(), s.entry_logprobs[b - n : b].tolist(), strict=True))
        for b, n in zip(ends, s.num_kept, strict=True)
    ]


def top(positions: int, k: int, vocab: int = VOCAB) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [P, V], the ids of the top k [P, k] and their log-probabilities, float64."""
    logits = RNG.normal(size=(positions, vocab)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logits, 1)[:, :k]
    return logits, ids, np.take_along_axis(logprobs, ids, 1)


# ---------------------------------------------------------------------------------------------------- Megatron


def megatron_saves(folder: Path, values: np.ndarray, ids: np.ndarray, *, dp: int, mbs: int, version: int) -> None:
    """Restated from Megatron-LM: MegatronPretrainingSampler deals samples to ranks, LogitsSaverHooks writes them.

    logits_saver.py at 0e099c7 (version 1: a list of micro-batches, cp0_ in the name); version 2 is what
    decode_logprobs_payload of utils.py at 10cc4f5 reads. values, ids: [iterations, gbs, S, K].
    """
    folder.mkdir()
    for rank in range(dp):
        name = f"{'cp0_' if version == 1 else ''}dp{rank}__{len(values) - 1}.tar"
        with tarfile.open(folder / name, "w") as archive:
            saver: dict[str, Any] = {"k": values.shape[-1], "p": None, "min_k": 1, "save_dtype": "fp16"}
            if version == 2:
                saver |= {"format_version": 2, "mbs_save": mbs, "dp_size_save": dp, "gbs_save": values.shape[1]}
            members = [("_meta.json", json.dumps({"hash": "x", "identifiers": {}, "saver": saver}).encode())]
            for iteration in range(len(values)):
                micro = range(values.shape[1] // (mbs * dp))
                rows = [[(m * dp + rank) * mbs + j for j in range(mbs)] for m in micro]
                v = [torch.tensor(values[iteration, r]).transpose(0, 1).half() for r in rows]
                i = [torch.tensor(ids[iteration, r]).transpose(0, 1) for r in rows]
                low, high = [(x & 0xFFFF).to(torch.uint16) for x in i], [(x >> 16).bool() for x in i]
                data: dict[str, Any] = {"values": v, "indices_low": low, "bit_17": high}
                if version == 2:
                    data = {"format_version": 2, **{name: torch.cat(part, 1) for name, part in data.items()}}
                packed = io.BytesIO()
                torch.save(data, packed)
                members.append((f"{iteration}.pt.zst", pa.Codec("zstd").compress(packed.getvalue(), asbytes=True)))
            for member, content in members:
                about = tarfile.TarInfo(member)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("dp", "mbs", "gbs"), [(1, 1, 2), (2, 2, 8), (3, 1, 6)])
def test_every_sample_of_megatron_s_cache_gets_its_tokens(
    tmp_path: Path, version: int, dp: int, mbs: int, gbs: int
) -> None:
    """Whatever ranks and micro-batches it was dealt to; ids above 2^16; entries that top-p left out."""
    iterations, seq, k, vocab = 2, 5, 3, 131000
    logprobs = np.log(np.full((iterations, gbs, seq, k), 0.25)) - RNG.random((iterations, gbs, seq, k))
    ids = np.stack([RNG.choice(vocab, k, replace=False) for _ in range(iterations * gbs * seq)]).reshape(logprobs.shape)
    ids[0, 0, 0, 0] = 130999
    values, marked = logprobs.copy(), ids.copy()
    values[:, :, 1, 2], marked[:, :, 1, 2] = -1e4, -1
    megatron_saves(tmp_path / "cache", values, marked, dp=dp, mbs=mbs, version=version)
    tokens = RNG.integers(0, vocab, (iterations * gbs, seq + 1))
    samples = write_jsonl(tmp_path / "samples.jsonl", [{"input_ids": row.tolist()} for row in tokens])
    dataset = imported(tmp_path / "cache", tmp_path / "d", "megatron", samples=str(samples), vocab_size=vocab)
    assert dataset.num_rows == iterations * gbs
    for row in range(dataset.num_rows):
        i, g = divmod(row, gbs)
        np.testing.assert_array_equal(dataset[row].token_ids, tokens[row])
        entries = lists_of(dataset, row)
        assert entries[0] == {} and len(entries[2]) == k - 1
        for place in range(seq):
            expected = [n for n in range(k) if not (place == 1 and n == 2)]
            assert list(entries[place + 1]) == ids[i, g, place, expected].tolist()
            assert np.allclose(list(entries[place + 1].values()), logprobs[i, g, place, expected], rtol=2**-10)
    assert verify(dataset, deep=True) == []


def megatron_loads(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Restated from utils.py at 10cc4f5: iter_logprobs_tar_entries and decode_logprobs_payload (zstd by pyarrow)."""
    loaded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in folder.glob("*dp0__*.tar"):
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name == "_meta.json":
                    saver = json.loads(content)["saver"]
                    assert {"mbs_save", "dp_size_save", "gbs_save"} <= saver.keys() and saver["format_version"] >= 2
                    continue
                assert content[4] >> 5, (
                    "zstandard.decompress needs the size in the frame's header (RFC 8878, 3.1.1.1.1)"
                )
                raw = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
                tensors = torch.load(io.BytesIO(raw), weights_only=True)
                indices = (tensors["bit_17"].long() << 16) | tensors["indices_low"].long()
                loaded[int(member.name.split(".")[0])] = (tensors["values"], indices)
    return [loaded[number] for number in range(len(loaded))]


def test_megatron_reads_the_export_and_it_comes_back(captured: Path, tmp_path: Path) -> None:
    dataset, seq = kdata.open(captured), 40
    lines = export_megatron(dataset, tmp_path / "out", seq)
    samples = megatron_loads(tmp_path / "out")
    assert len(samples) == dataset.num_rows and len({values.shape for values, _ in samples}) == 1
    for row, (values, indices) in enumerate(samples):
        entries = lists_of(dataset, row)
        assert values.dtype is torch.float16 and values.shape[:2] == (seq, 1)
        for place in range(seq):
            there = values[place, 0] > -999
            expected = entries[place + 1] if place + 1 < len(entries) else {}
            found = dict(zip(indices[place, 0][there].tolist(), values[place, 0][there].tolist(), strict=True))
            assert found.keys() == expected.keys() and (indices[place, 0][~there] == 131071).all()
            assert all(abs(found[n] - expected[n]) <= 2**-10 * abs(expected[n]) + 1e-6 for n in found)
    page = (tmp_path / "out/README.md").read_text()
    assert all(line in page for line in lines) and any("longer than the sequence length" in line for line in lines)
    back = imported(
        tmp_path / "out", tmp_path / "back", "megatron", samples=str(tmp_path / "out/samples.parquet"), vocab_size=VOCAB
    )
    assert back.num_rows == dataset.num_rows
    for row in range(back.num_rows):
        one, two = lists_of(dataset, row)[: seq + 1], lists_of(back, row)
        assert [sorted(a) for a in one] == [sorted(b) for b in two]


@pytest.mark.parametrize("name", ["../../{}", "/tmp/{}", "x/{}", "{}.link"])
def test_an_archive_whose_members_cannot_be_read_is_not_passed_over(tmp_path: Path, name: str) -> None:
    """Its samples were left out without a word. Nothing is written where such a name leads."""
    values = np.log(np.full((1, 4, 3, 2), 0.25))
    megatron_saves(tmp_path / "cache", values, np.broadcast_to([5, 6], values.shape).copy(), dp=1, mbs=1, version=2)
    [path] = (tmp_path / "cache").glob("*.tar")
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        contents = [(member, file.read() if file else b"") for member, file in members]
    with tarfile.open(path, "w") as archive:
        for member, content in contents:
            member.name = name.format(member.name)
            if name.endswith(".link"):
                member.name, member.type, member.linkname, member.size = (
                    member.name[:-5],
                    tarfile.SYMTYPE,
                    "/etc/passwd",
                    0,
                )
            archive.addfile(member, io.BytesIO(content))
    samples = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": [1, 2, 3, 4]}] * 4)
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(DataError, match=r"\.tar holds no iteration of Megatron's cache"):
        imported(tmp_path / "cache", tmp_path / "d", "megatron", samples=str(samples), vocab_size=VOCAB)
    left = {path.name for path in set(tmp_path.parent.rglob("*")) - set(before)}
    assert left <= {"d", "dataset.json", "data", "index", "rejects", ".d.progress.jsonl"}, (
        "nothing but a dataset that was begun"
    )


def test_a_cache_without_tokens_or_ranks_is_refused(tmp_path: Path) -> None:
    values = np.log(np.full((1, 4, 3, 2), 0.25))
    ids = np.broadcast_to([5, 6], values.shape).copy()
    megatron_saves(tmp_path / "cache", values, ids, dp=2, mbs=1, version=2)
    with pytest.raises(ConfigError, match="--set samples=FILE"):
        imported(tmp_path / "cache", tmp_path / "d", "megatron", vocab_size=VOCAB)
    samples = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": [1, 2, 3, 4]}] * 3)
    dataset = imported(tmp_path / "cache", tmp_path / "d", "megatron", samples=str(samples), vocab_size=VOCAB)
    assert dataset.num_rows == 3 and dataset.rejected() == {"no_token_ids": 1}
    (tmp_path / "cache/dp0__0.tar").unlink()
    with pytest.raises(DataError, match="the ranks \\[1\\]; the others are missing"):
        imported(tmp_path / "cache", tmp_path / "e", "megatron", samples=str(samples), vocab_size=VOCAB)


@pytest.mark.parametrize("name", ["99999999999999999", "9" * 30])
def test_an_iteration_of_any_number_takes_no_time(tmp_path: Path, name: str) -> None:
    """Samples that the cache leaves out are passed over, and a name may say that these are any number."""
    values = np.log(np.full((1, 4, 3, 2), 0.25))
    ids = np.broadcast_to([5, 6], values.shape).copy()
    megatron_saves(tmp_path / "made", values, ids, dp=1, mbs=1, version=2)
    (tmp_path / "cache").mkdir()
    with (
        tarfile.open(tmp_path / "made/dp0__0.tar") as made,
        tarfile.open(tmp_path / "cache/dp0__0.tar", "w") as archive,
    ):
        for member in made:
            content = made.extractfile(member)
            member.name = member.name.replace("0.pt.zst", f"{name}.pt.zst")
            archive.addfile(member, content)
    samples = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": [1, 2, 3, 4]}] * 3)
    with pytest.raises(DataError):
        imported(tmp_path / "cache", tmp_path / "d", "megatron", samples=str(samples), vocab_size=VOCAB)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hostile"),)


@pytest.mark.parametrize("kind", ["pickle", "bomb", "garbage"])
def test_a_hostile_cache_runs_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed = io.BytesIO()
    torch.save({"values": Hostile(), "indices_low": 0, "bit_17": 0}, packed)
    content = {"pickle": packed.getvalue(), "bomb": bytes(300 << 20), "garbage": b"no torch file"}[kind]
    (tmp_path / "cache").mkdir()
    with tarfile.open(tmp_path / "cache/dp0__0.tar", "w") as archive:
        member = pa.Codec("zstd").compress(content, asbytes=True)
        about = tarfile.TarInfo("0.pt.zst")
        about.size = len(member)
        archive.addfile(about, io.BytesIO(member))
    samples = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": [1, 2, 3, 4]}])
    error = "250 times" if kind == "bomb" else "is not a payload of Megatron's cache"
    with pytest.raises(DataError, match=error):
        imported(tmp_path / "cache", tmp_path / "d", "megatron", samples=str(samples), vocab_size=VOCAB)
    assert not (tmp_path / "hostile").exists()


# -------------------------------------------------------------------------------------------------------- NeMo


def test_nemo_s_logits_become_log_probabilities(tmp_path: Path) -> None:
    """Rows as write_generations of NeMo-Aligner at 249c3f6 writes them: shifted labels, padding behind."""
    logits, ids, logprobs = top(6, 4)
    conversation = RNG.integers(3, VOCAB, 6).tolist()
    row = {
        "tokens": [*conversation[:-1], 1],
        "labels": [*conversation[1:], 1],
        "loss_mask": [0, 0, 1, 1, 1, 0],
        "topk_logits": np.take_along_axis(logits, ids, 1).tolist(),
        "topk_token_ids": ids.tolist(),
        "log_sum_exp_logits": np.log(np.exp(logits).sum(1)).tolist(),
        "index": 7,
    }
    source = write_jsonl(tmp_path / "n.jsonl", [row, {**row, "index": 8, "loss_mask": [0] * 6}])
    dataset = imported(source, tmp_path / "d", "nemo", vocab_size=VOCAB)
    assert dataset.index(["id"])["id"].to_pylist() == ["index-7"] and dataset.rejected() == {"no_targets": 1}
    assert dataset[0].token_ids.tolist() == conversation
    assert dataset[0].target_mask.tolist() == [False, False, False, True, True, True]
    entries = lists_of(dataset, 0)
    for place in range(5):
        assert list(entries[place + 1]) == ids[place].tolist()
        assert np.allclose(list(entries[place + 1].values()), logprobs[place], atol=1e-5)


# -------------------------------------------------------------------------------------------------- DistillKit


def legacy_saves(folder: Path, ids: np.ndarray, exact: np.ndarray, coefficients: np.ndarray, bits: int) -> None:
    """Restated from DistillKit a61c2e7, compression/legacy.py: pack_tensor, and sample_common.py's schema."""
    per = 64 // bits
    padded = np.pad(ids, ((0, 0), (0, -ids.shape[1] % per))).reshape(len(ids), -1, per).astype(np.uint64)
    packed = np.zeros(padded.shape[:2], np.uint64)
    for i in range(per):
        packed |= padded[:, :, i] << np.uint64(bits * i)
    folder.mkdir(exist_ok=True)
    table = {
        "input_ids": pa.array([list(range(2, 3 + len(ids)))], pa.list_(pa.uint64())),
        "packed_indices": pa.array([packed.tolist()], pa.list_(pa.list_(pa.uint64()))),
        "exact_values": pa.array([exact.tolist()], pa.list_(pa.list_(pa.float32()))),
        "coeffs": pa.array([coefficients.tolist()], pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(table), folder / "data_0.parquet")


LEGACY = {"vocab_size": VOCAB, "k": 9, "exact_k": 4, "polynomial_degree": 2, "with_sqrt_term": True}


def test_distillkit_s_older_files_are_decoded_as_its_own_code_does(tmp_path: Path) -> None:
    _, ids, logprobs = top(5, 9)
    axis = np.arange(1, 6, dtype=np.float64)
    terms = np.stack([axis**-0.0, axis**-1, axis**-2, np.sqrt(axis)], 1)
    coefficients = np.linalg.lstsq(terms, logprobs[:, 4:].T, rcond=None)[0].T.astype(np.float32)
    legacy_saves(tmp_path / "s", ids, logprobs[:, :4].astype(np.float16), coefficients, 9)
    (tmp_path / "s/train.yml").write_text(
        yaml.safe_dump({"teacher": {"kind": "dataset", "legacy_logit_compression": LEGACY}})
    )
    dataset = imported(tmp_path / "s", tmp_path / "d", "distillkit")
    for place, entries in enumerate(lists_of(dataset, 0)[1:]):
        assert list(entries) == ids[place].tolist()
        expected = [*logprobs[place, :4].astype(np.float16), *(terms @ coefficients[place].astype(np.float64))]
        assert np.allclose(list(entries.values()), expected, atol=1e-5)
    assert dataset.info.vocab_size == VOCAB


def packed_set(folder: Path) -> dict[str, Any]:
    """Files of the newer layout, with 2 exact values and ids of 9 bits; their settings."""
    from tests.kdata.share.test_interchange import save_distillkit

    save_distillkit(folder, [np.log(np.array([[0.5, 0.25], [0.7, 0.1]]))], [np.array([[5, 6], [7, 299]])])
    settings: dict[str, Any] = yaml.safe_load((folder / "compression_config.yaml").read_text())
    (folder / "compression_config.yaml").unlink()
    return settings


@pytest.mark.parametrize(
    "place", ["README.md", "configs/distill.yaml", "settings.json", "data/compression_config.yaml"]
)
def test_settings_are_found_wherever_they_are_beside_the_files(tmp_path: Path, place: str) -> None:
    settings = packed_set(tmp_path / "s")
    text = yaml.safe_dump({"teacher": {"kind": "dataset", "logprob_compressor": settings}})
    if place.endswith(".md"):
        wrong = yaml.safe_dump({"teacher": {"logprob_compressor": {**settings, "k": 3, "exact_k": 3}}})
        text = f"# A set\n\n```yaml\n{wrong}```\n\nTrain:\n\n```yaml\nmodel: m\n{text}```\n"
    if place.endswith("compression_config.yaml"):
        text = yaml.safe_dump(settings)
    (tmp_path / "s" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "s" / place).write_text(json.dumps(settings) if place.endswith(".json") else text)
    dataset = imported(tmp_path / "s", tmp_path / "d", "distillkit")
    assert dataset[0].entry_ids.tolist() == [5, 6, 7, 299] and dataset.info.vocab_size == VOCAB


def test_settings_that_do_not_fit_or_contradict_are_not_taken(tmp_path: Path) -> None:
    settings = packed_set(tmp_path / "s")
    (tmp_path / "s/a.yaml").write_text(yaml.safe_dump({**settings, "exact_dtype": "float16"}))
    with pytest.raises(MissingError, match="--compression"):
        imported(tmp_path / "s", tmp_path / "d", "distillkit")
    for name, delta in (("b", True), ("c", False)):
        (tmp_path / f"s/{name}.yaml").write_text(yaml.safe_dump({**settings, "delta_encoding": delta}))
    with pytest.raises(ConfigError, match=r"several compression settings .* --compression"):
        imported(tmp_path / "s", tmp_path / "d", "distillkit")
    dataset = imported(tmp_path / "s", tmp_path / "d", "distillkit", compression=str(tmp_path / "s/c.yaml"))
    assert dataset.num_rows == 1


# ------------------------------------------------------------------------------------------------- any top-k lists


def test_lists_under_other_names_are_read_where_there_is_no_doubt(tmp_path: Path) -> None:
    _, ids, logprobs = top(4, 3)
    plain = {"tokens": [3, 4, 5, 6, 7], "indices": ids.tolist()}
    rows = {
        "logprobs": {**plain, "numbers": logprobs.tolist()},
        "probs": {**plain, "numbers": np.exp(logprobs).tolist()},
        "named": {**plain, "top_probs": np.exp(logprobs).tolist()},
    }
    for name, row in rows.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", [row])
        dataset = imported(source, tmp_path / name, "plain", vocab_size=VOCAB, aligned="after")
        entries = lists_of(dataset, 0)
        assert [list(one) for one in entries[1:]] == ids.tolist()
        assert np.allclose([list(one.values()) for one in entries[1:]], logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "settings", "error"),
    [
        ({"numbers": [[2.0, 1.0], [3.0, -1.0]]}, {}, "--values logprobs, probs or logits"),
        ({"numbers": [[-12.0, -13.0], [-11.0, -12.0]]}, {}, "--values logprobs, probs or logits"),
        ({"logits": [[2.0, 1.0], [3.0, -1.0]]}, {}, "without the log-sum-exp"),
        ({"numbers": [[0.5, 1.5], [0.5, 0.1]]}, {"values": "probs"}, "no probability"),
        ({"numbers": [[0.5, 0.5], [0.5, 0.1]], "other": [[0.5], [0.5]]}, {}, "--set values_column=NAME"),
    ],
)
def test_lists_that_leave_a_doubt_are_refused(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], error: str
) -> None:
    row = {"tokens": [3, 4, 5], "indices": [[1, 2], [3, 4]], **change}
    with pytest.raises(DataError, match=error):
        imported(
            write_jsonl(tmp_path / "r.jsonl", [row]),
            tmp_path / "d",
            "plain",
            vocab_size=VOCAB,
            aligned="after",
            **settings,
        )


def test_the_kind_of_numbers_is_never_guessed_wrong() -> None:
    """Logits of a real shape are never taken for something else, log-probabilities and probabilities always known."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        logits = rng.normal(rng.normal() * 10, 1 + 3 * rng.random(), (6, 50))
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum(1, keepdims=True)) - logits.max()
        counts = np.full(6, 10)
        best = -np.sort(-logprobs, 1)[:, :10]
        assert kind_of(best.reshape(-1), counts, "x") == "logprobs"
        assert kind_of(np.exp(best).reshape(-1), counts, "x") == "probs"
        raw = -np.sort(-logits, 1)[:, :10].reshape(-1)
        if (np.exp(raw).reshape(6, 10).sum(1) > 1.02).any() or raw.max() > 0:
            with pytest.raises(DataError):
                kind_of(raw, counts, "x")


def test_a_tokenizer_beside_the_files_gives_vocabulary_and_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "s").mkdir()
    row = {"id": "a", "input_ids": [0, 84, 105], "topk_ids": [[], [5], [6]], "topk_logprobs": [[], [-0.5], [-0.5]]}
    write_jsonl(tmp_path / "s/rows.jsonl", [row])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, tmp_path / "s" / name)
    dataset = imported(tmp_path / "s", tmp_path / "d", "plain")
    assert dataset.info.vocab_size == VOCAB and len(dataset.info.tokenizer.hash) == 64
    assert dataset.index(["text"])["text"][0].as_py()


# ---------------------------------------------------------------------------------------------- where the files are


def many_rows(folder: Path) -> Path:
    folder.mkdir()
    for part in range(3):
        rows = [
            {
                "id": f"{part}-{n}",
                "input_ids": [3, 4, 5],
                "topk_ids": [[], [n % 9], [2]],
                "topk_logprobs": [[], [-0.5], [-1.0]],
            }
            for n in range(20)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{part}.parquet")
    return folder


def test_files_at_a_url_give_the_same_dataset_and_a_kill_costs_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.bucket  # noqa: F401

    source = many_rows(tmp_path / "s")
    here = imported(source, tmp_path / "here", "plain", vocab_size=VOCAB, unit_tokens=30)
    url = f"bucket://{source}"
    plain_commit, committed = Writer.commit, []

    def commit(self: Writer, unit: Any) -> Any:
        if len(committed) == 2:
            raise KeyboardInterrupt
        committed.append(unit.number)
        return plain_commit(self, unit)

    monkeypatch.setattr(Writer, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        imported(url, tmp_path / "there", "plain", vocab_size=VOCAB, unit_tokens=30)
    first = digests(tmp_path / "there/data")
    assert len(first) == 2
    monkeypatch.setattr(Writer, "commit", plain_commit)
    there = imported(url, tmp_path / "there", "plain", vocab_size=VOCAB, unit_tokens=30)
    after = digests(tmp_path / "there/data")
    assert all(after[name] == digest for name, digest in first.items())
    assert there.num_rows == here.num_rows == 60
    assert [lists_of(there, row) for row in range(60)] == [lists_of(here, row) for row in range(60)]
    one = imported(f"{url}/part-1.parquet", tmp_path / "one", "plain", vocab_size=VOCAB)
    assert one.index(["id"])["id"].to_pylist() == [f"1-{n}" for n in range(20)]
    with pytest.raises((ConfigError, MissingError)):
        imported(f"bucket://{tmp_path}/nothing", tmp_path / "none", "plain", vocab_size=VOCAB)


def test_rows_come_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the last file is opened, the first shards are committed. (Without `values` they wait for 200 positions.)"""
    opened: list[str] = []
    plain_batches = importer.batches

    def batches(files: list[Any]) -> Any:
        for file in files:
            opened.append(file.name)
            yield from plain_batches([file])

    states: list[tuple[int, int]] = []
    plain_commit = Writer.commit
    monkeypatch.setattr(importer, "batches", batches)
    monkeypatch.setattr(Writer, "commit", lambda s, u: (states.append((len(opened), u.number)), plain_commit(s, u))[1])
    imported(many_rows(tmp_path / "s"), tmp_path / "d", "plain", vocab_size=VOCAB, unit_tokens=30, values="logprobs")
    assert states[0] == (1, 0) and states[-1][0] == 3


@pytest.mark.parametrize("format", ["plain", "axolotl"])
def test_an_export_says_beside_the_file_what_is_not_in_it(captured: Path, tmp_path: Path, format: Any) -> None:
    lines = export_dataset(kdata.open(captured), tmp_path / "x.parquet", format)
    page = (tmp_path / "x.parquet.README.md").read_text()
    assert lines and all(line in page for line in lines)


@pytest.mark.parametrize("format", ["plain", "distillkit"])
def test_a_repository_on_the_hub_is_read_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    """With the client of the Hub; the branch moves on while rows are read."""
    hub = HubServer()
    hub.in_process(monkeypatch, tmp_path / "cache")
    settings: dict[str, Any] = {"vocab_size": VOCAB}
    if format == "plain":
        many_rows(tmp_path / "s")
    else:
        logprobs = [np.log(np.sort(RNG.dirichlet(np.ones(3), length))[:, ::-1]) for length in range(3, 23)]
        save_distillkit(tmp_path / "s", logprobs, [np.argsort(RNG.random((len(x), 300)))[:, :3] for x in logprobs])
        settings = {}
    (tmp_path / "other").mkdir()
    hub.push(tmp_path / "s", "a" * 40, "v1", "main")
    plain_commit = Writer.commit

    def commit(self: Writer, unit: Any) -> Any:
        hub.push(tmp_path / "other", "b" * 40, "v1", "main")
        return plain_commit(self, unit)

    monkeypatch.setattr(Writer, "commit", commit)
    dataset = imported("hf://me/logits@v1", tmp_path / "d", format, unit_tokens=30, **settings)
    monkeypatch.setattr(Writer, "commit", plain_commit)
    here = imported(tmp_path / "s", tmp_path / "here", format, unit_tokens=30, **settings)
    hub.close()
    assert hub.refs["v1"] == "b" * 40 and len(dataset) == len(here) > 0 and verify(dataset, deep=True) == []
    assert [one.name for one in dataset.manifest] == [one.name for one in here.manifest]
    for row, same in enumerate(here):
        np.testing.assert_array_equal(dataset[row].token_ids, same.token_ids)
        np.testing.assert_array_equal(dataset[row].entry_logprobs, same.entry_logprobs)
