"""The leakage audit on data with a known leak: logits z = W h with a small hidden size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.attacks import context_hashes, distinct_per_context, eigen_gap, subspace_overlap
from kdata.check.audit import NOT_RECOVERED, audit, load_head
from kdata.errors import ConfigError, DataError, MismatchError, MissingError
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TokenizerInfo
from kdata.pipelines.cli.main import app
from kdata.store.writer import Writer
from tests.fakes import StandInTeacher, run_capture

V, D = 64, 6
HEAD = np.random.default_rng(0).standard_normal((V, D))
TEACHER = StandInTeacher()


def low_rank(root: Path, *, tokens: int, k: int, seed: int = 1, choice: int = 0, per_row: int = 2000) -> kdata.Dataset:
    """`tokens` positions of log-softmax(W h), h Gaussian, with k ids at random kept at each.

    The text is noise, and two rows of one `seed` share no context. Another `choice` keeps other ids.
    """
    rng, chooser = np.random.default_rng(seed), np.random.default_rng((seed, choice))
    info = new_info(
        format_version="1.0",
        vocab_size=V,
        teacher=TEACHER.info,
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id="plain", version=1, kind="topk", parameters={"k": k}),
        tail="ghost",
    )
    records = []
    for number in range(max(1, tokens // per_row)):
        z_TV = rng.standard_normal((per_row, D)) @ HEAD.T
        z_TV -= np.log(np.exp(z_TV).sum(1, keepdims=True))
        ids_TK = np.argsort(chooser.random((per_row, V)), 1)[:, :k]
        kept_TK = np.take_along_axis(z_TV, ids_TK, 1)
        order = np.argsort(-kept_TK, 1)
        ids_TK, kept_TK = np.take_along_axis(ids_TK, order, 1), np.take_along_axis(kept_TK, order, 1)
        recorded = np.arange(per_row) > 0
        token_ids = rng.integers(0, V, per_row).astype(np.int32)
        token_ids[0] = (number + 30 * seed) % V
        mass = np.exp(kept_TK).sum(1)
        records.append(
            Record(
                id=f"r{number}",
                domain="x",
                token_ids=token_ids,
                target_mask=recorded,
                logprob=np.where(recorded, z_TV[np.arange(per_row), token_ids], np.nan).astype(np.float32),
                rank=recorded.astype(np.int32),
                log_tail=np.where(recorded, np.log1p(-mass), np.nan).astype(np.float32),
                entropy=np.full(per_row, np.nan, np.float32),
                kept=Kept.top(ids_TK, kept_TK, recorded),
                text=None,
            )
        )
    with Writer(root, info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(UnitResult(0, records))
        writer.finish(1)
    return kdata.open(root)


def test_many_sparse_rows_reveal_the_projection(tmp_path: Path) -> None:
    """k = 4 ids at a context are fewer than d = 6, and yet the co-moments have a gap at d + 1 and span the true head."""
    report = audit([low_rank(tmp_path / "d", tokens=120_000, k=4)], hidden_size=D, head_VD=HEAD, block=40)
    assert report.k_eff == 5 and report.contexts_over == 0  # k, and the actual token
    assert report.gap_index in (D, D + 1) and report.gap > report.null_gap
    assert report.overlap is not None and report.overlap > 0.95 > report.null_overlap  # type: ignore[operator]
    assert report.median_pairs > 100
    assert report.verdict == "FAIL" and len(report.reasons) == 3


def test_few_sparse_rows_do_not_and_the_report_claims_no_safety(tmp_path: Path) -> None:
    report = audit([low_rank(tmp_path / "d", tokens=500, k=4, per_row=500)], hidden_size=D, head_VD=HEAD, block=40)
    assert report.verdict == NOT_RECOVERED == "not recovered by these two attacks"
    assert report.overlap is not None and report.overlap < 0.9
    assert report.median_pairs < 5 and report.reasons == []
    assert "safe" not in "\n".join(report.lines()).lower()


def test_leaks_add_up_over_releases(tmp_path: Path) -> None:
    """A text released twice, with other ids at random: up to 5 + 5 and the actual token for one context."""
    one = low_rank(tmp_path / "1", tokens=600, k=5, per_row=300)
    other = low_rank(tmp_path / "2", tokens=600, k=5, per_row=300, seed=2)
    again = low_rank(tmp_path / "3", tokens=600, k=5, per_row=300, choice=1)
    assert distinct_per_context([one], D) == distinct_per_context([one, one, other], D) == (6, 0)
    k_eff, over = distinct_per_context([one, again], D)
    assert k_eff == 11 and over is not None and over > 500


def test_more_ids_for_a_context_than_d_fail(tmp_path: Path) -> None:
    dataset = low_rank(tmp_path / "d", tokens=500, k=9, per_row=500)
    report = audit([dataset], hidden_size=D, block=40)
    assert report.k_eff == 10 and report.contexts_over and report.contexts_over > 400
    assert report.verdict == "FAIL" and "distinct ids are released for one context" in report.reasons[0]


def test_equal_contexts_and_only_these_have_equal_hashes(captured: Path) -> None:
    dataset = kdata.open(captured)
    for sequences in (dataset.take(np.arange(10)), dataset.take(np.array([3]))):
        hashes = context_hashes(sequences)
        seen: dict[tuple[int, ...], int] = {}
        for a, b in sequences.spans():
            for t in range(a, b):
                seen.setdefault(tuple(sequences.token_ids[a:t]), int(hashes[t]))
                assert seen[tuple(sequences.token_ids[a:t])] == int(hashes[t])
        assert len(set(seen.values())) == len(seen)


def test_distinct_ids_are_counted_as_a_dict_of_sets_counts_them(captured: Path) -> None:
    sets: dict[tuple[int, ...], set[int]] = {}
    dataset = kdata.open(captured)
    for s in (dataset.take(np.array([row])) for row in range(dataset.num_rows)):
        for t in range(1, len(s.token_ids)):
            ids = set(s.entry_ids[s.entry_offsets[t] : s.entry_offsets[t + 1]].tolist()) | {int(s.token_ids[t])}
            sets.setdefault(tuple(s.token_ids[:t]), set()).update(ids)
    sizes = [len(ids) for ids in sets.values()]
    assert distinct_per_context([dataset], 9) == (max(sizes), sum(n > 9 for n in sizes))


def test_a_gap_and_an_overlap_of_a_known_matrix() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    values = np.concatenate((np.linspace(9, 5, 8), np.full(22, 0.01)))
    matrix = basis * values @ basis.T
    gap, index = eigen_gap(matrix, 8)
    assert (round(gap), index) == (500, 8)
    assert eigen_gap(matrix, None)[1] == 8
    assert subspace_overlap(matrix, basis[:, :7]) > 0.8
    assert subspace_overlap(basis @ np.diag(values) @ basis.T, basis[:, 20:27]) < 0.3


def test_datasets_that_cannot_be_audited_are_refused(
    tmp_path: Path, captured: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    dataset = kdata.open(captured)
    with pytest.raises(ConfigError, match="--block"):
        audit([dataset], hidden_size=64, block=32)
    with pytest.raises(MismatchError, match="the head has the shape"):
        audit([dataset], head_VD=HEAD)
    with pytest.raises(DataError, match="no rows"):
        audit([])
    small = low_rank(tmp_path / "d", tokens=10, k=2, per_row=10)
    with pytest.raises(MismatchError, match="vocabularies"):
        audit([dataset, small])
    draws = run_capture(tmp_path / "s", corpus_file, tokenizer_dir, kind="sampled")
    assert audit([draws], hidden_size=4).verdict in ("FAIL", "WARN", NOT_RECOVERED)  # the actual tokens are exact


def test_the_head_is_read_from_a_model_s_folder(llama_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(llama_dir).lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(load_head(llama_dir), own)
    with pytest.raises(MissingError, match="no safetensors"):
        load_head(tmp_path)


def test_the_command_prints_the_report_and_fails_where_an_attack_succeeds(tmp_path: Path) -> None:
    leaky, dry = (
        low_rank(tmp_path / "a", tokens=500, k=9, per_row=500),
        low_rank(tmp_path / "b", tokens=300, k=3, per_row=300),
    )
    run = CliRunner().invoke
    result = run(app, ["audit", str(leaky.path), "--hidden-size", str(D), "--block", "40"])
    assert result.exit_code == 1 and "verdict: FAIL" in result.output
    result = run(app, ["audit", str(dry.path), "--hidden-size", str(D), "--block", "40", "--format", "json"])
    answer = json.loads(result.output.splitlines()[-1])
    assert result.exit_code == 0 and answer["verdict"] == NOT_RECOVERED and answer["k_eff"] == 4


def test_draws_by_context_release_nothing_new_where_texts_have_a_common_beginning(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Sixty texts with one beginning: by sequence they release more and more ids of it, by context those of one position.

    Of how the work is cut into units nothing is seen.
    """
    rng, corpus = np.random.default_rng(0), tmp_path / "corpus.jsonl"
    tails = ["".join(rng.choice(list("abcdefgh "), 12)) for _ in range(60)]
    rows = ({"id": tail, "domain": "chat", "text": f"You are a helpful assistant. {tail}"} for tail in tails)
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = {"kind": "sampled", "num_draws": 8}
    by_sequence = run_capture(tmp_path / "a", corpus, tokenizer_dir, **keep)
    by_context = run_capture(tmp_path / "b", corpus, tokenizer_dir, draws_by="context", **keep)
    other_units = run_capture(tmp_path / "c", corpus, tokenizer_dir, draws_by="context", unit_tokens=40, **keep)
    assert by_context.info.codec.parameters["draws_by"] == "context"
    assert len(other_units.manifest) > len(by_context.manifest)
    for one, other in zip(by_context, other_units, strict=True):
        assert one.entry_ids.tolist() == other.entry_ids.tolist()
    common = 0
    while len({sequence.token_ids[: common + 1].tobytes() for sequence in by_context}) == 1:
        common += 1
    assert common > 5

    def released(dataset: kdata.Dataset, place: int) -> int:
        return len(
            {
                int(token)
                for sequence in dataset
                for token in sequence.entry_ids[sequence.entry_offsets[place] : sequence.entry_offsets[place + 1]]
            }
        )

    assert all(released(by_context, place) <= 8 for place in range(1, common))
    several = [released(by_sequence, place) for place in range(1, common)]
    assert max(several) > 16 and sum(several) > 2 * sum(released(by_context, place) for place in range(1, common))
    # What stands behind the beginning differs, and the log-probability of each actual token is released too.
    assert distinct_per_context([by_context], None)[0] < distinct_per_context([by_sequence], None)[0]
