"""Softened datasets, against dense float64 distributions."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
import kdata.jobs.soften as soften_module
from kdata.check.verify import verify
from kdata.config import parse_config
from kdata.errors import ConfigError, DataError, KdataError, MismatchError, MissingError
from kdata.format.coded import logprob_bound
from kdata.format.kept import draw_mask
from kdata.format.measures import unknown
from kdata.format.schema import canonical_json, json_digest
from kdata.format.sequences import Sequences
from kdata.jobs.payloads import inputs_of_shard
from kdata.jobs.soften import SoftenConfig, SoftenReport, soften
from kdata.jobs.softening import Law, soften_sequences
from kdata.jobs.softening import soften as soften_numbers
from kdata.selection.position_rules import SqlPositions
from kdata.selection.ranked import All
from tests.fakes import StandInTeacher, digests, run_capture, write_jsonl

V = 40
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 12},
    "hybrid": {"kind": "hybrid", "k": 4, "num_draws": 9},
    "threshold": {"kind": "threshold", "threshold": 0.05},
}
PATTERN = "dog|fox"


def dense_softened(p_V: np.ndarray, num_exact: int, s: float, law: Law, u_V: np.ndarray) -> np.ndarray:
    """The definition on the whole vocabulary: the rest made even, softmax(log p / tau), mixed with u; ids by falling p."""
    even_V = p_V.copy()
    even_V[num_exact:] = p_V[num_exact:].sum() / (len(p_V) - num_exact)
    powers_V = even_V ** (1 / (1 + law.temperature_rise * s))
    mixed_V: np.ndarray = (1 - law.noise * s) * powers_V / powers_V.sum() + law.noise * s * u_V
    return mixed_V


shares = st.floats(0, 1)


@given(st.integers(0, 2**32), st.integers(1, V - 1), shares, st.floats(0, 9), shares, st.floats(0.1, 40))
def test_numbers_are_those_of_the_whole_vocabulary_and_sum_to_one(
    seed: int, num_exact: int, s: float, rise: float, noise: float, sharpness: float
) -> None:
    rng, law = np.random.default_rng(seed), Law(rise, noise, 1.0)
    p_V = np.sort(np.exp(sharpness * rng.standard_normal(V)))[::-1]
    p_V = np.maximum(p_V / p_V.sum(), 1e-30)
    p_V /= p_V.sum()
    u_V = rng.dirichlet(np.ones(V))
    rest = p_V[num_exact:].sum()
    soft_N, soft_rest_T = soften_numbers(
        p_V[:num_exact], np.array([rest]), np.array([num_exact]), np.array([num_exact]), np.array([s]), V, law,
        u_V[:num_exact], np.array([u_V[num_exact:].sum()]),
    )  # fmt: skip
    expected_V = dense_softened(p_V, num_exact, s, law, u_V)
    assert np.allclose(soft_N, expected_V[:num_exact], rtol=1e-9, atol=1e-15)
    assert np.allclose(soft_rest_T[0], expected_V[num_exact:].sum(), rtol=1e-9)
    assert abs(soft_N.sum() + soft_rest_T[0] - 1) < 1e-12
    # Without noise the rest gets at least what softmax(z / tau) of the true tail would give it.
    true_V = p_V ** (1 / (1 + rise * s))
    bare, bare_rest = soften_numbers(
        p_V[:num_exact], np.array([rest]), np.array([num_exact]), np.array([num_exact]), np.array([s]), V,
        Law(rise, 0.0, 1.0), u_V[:num_exact], np.array([1.0]),
    )  # fmt: skip
    assert bare_rest[0] >= true_V[num_exact:].sum() / true_V.sum() - 1e-12
    assert bare[0] <= p_V[0] + 1e-12 or p_V[0] <= rest / (V - num_exact) * (1 + 1e-9)


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> dict[str, kdata.Dataset]:
    folder = tmp_path_factory.mktemp("sources")
    kinds = {**KINDS, "sampled": {"kind": "sampled", "num_draws": 11}}
    return {name: run_capture(folder / name, corpus_file, tokenizer_dir, **keep) for name, keep in kinds.items()}


def softer(source: kdata.Dataset, root: Path, **settings: Any) -> tuple[kdata.Dataset, SoftenReport]:
    return soften(root, source, SoftenConfig(**{"patterns": [PATTERN], **settings}))


def private_tokens(dataset: kdata.Dataset, row: int) -> np.ndarray:
    """Targets with a byte of a match, by a loop over Python's own matches: bool [T]."""
    number = int(np.searchsorted(dataset.shard_starts, row, side="right")) - 1
    one = inputs_of_shard(dataset, number, dataset.shard(number))[row - int(dataset.shard_starts[number])]
    assert one.text is not None and one.token_bytes is not None
    private, start = [], 0
    content = one.text.encode()
    for size in one.token_bytes.tolist():
        spans = [m.span() for m in re.finditer(PATTERN.encode(), content)]
        private.append(any(start < b and start + size > a and size > 0 for a, b in spans))
        start += size
    return np.array(private) & one.target_mask


@pytest.mark.parametrize("kind", KINDS)
def test_only_private_positions_change_and_they_are_those_of_the_formula(
    kind: str, sources: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    source, law = sources[kind], Law(2.0, 0.0, 1.0)
    result, report = softer(source, tmp_path / "soft", likelihood=0.5, temperature_rise=2.0, noise=0.0, drop_above=1.0)
    assert not verify(result, deep=True)
    teacher, vocab, softened = StandInTeacher(), source.info.vocab_size, 0
    for row in range(source.num_rows):
        before, after = source.take(np.array([row])), result.take(np.array([row]))
        private_T = private_tokens(source, row)
        assert np.array_equal(before.token_ids, after.token_ids)
        dense_TV = np.exp(teacher.dense(before.token_ids).astype(np.float64))
        for t in np.flatnonzero(before.target_mask):
            old, new = slice(*before.entry_offsets[t : t + 2]), slice(*after.entry_offsets[t : t + 2])
            if not private_T[t]:
                assert sorted(before.entry_ids[old]) == sorted(after.entry_ids[new])
                assert np.allclose(before.logprob[t], after.logprob[t], atol=0.04, rtol=0.04)
                assert before.rank[t] == after.rank[t]
                continue
            softened += 1
            count = int(before.num_exact[t])
            assert after.num_exact[t] == count and after.rank[t] == 0 and np.isnan(after.entropy[t])
            ids = before.entry_ids[old][:count]
            exact = np.exp(before.entry_logprobs[old][:count].astype(np.float64))
            p_V = np.concatenate([exact, np.full(vocab - count, (1 - exact.sum()) / (vocab - count))])
            expected_V = dense_softened(p_V, count, 0.5, law, np.zeros(vocab))
            # The grid of stored entries is 1/16 nat.
            assert dict(zip(after.entry_ids[new][:count].tolist(), after.entry_logprobs[new][:count], strict=True)) == (
                pytest.approx(dict(zip(ids.tolist(), np.log(expected_V[:count]), strict=True)), abs=0.1)
            )
            assert np.exp(after.log_tail[t]) == pytest.approx(expected_V[count:].sum(), abs=0.02)
            actual, growth = before.token_ids[t], expected_V[count:].sum() / p_V[count:].sum()
            own = np.flatnonzero(ids == actual)
            true = expected_V[own[0]] if len(own) else dense_TV[t, actual] * growth
            rounded_twice = 2 * float(logprob_bound(np.array([np.log(true)]))[0]) + 0.08
            assert after.logprob[t] == pytest.approx(np.log(true), abs=rounded_twice)
            drawn_before = dict(
                zip(before.entry_ids[old][count:].tolist(), before.entry_logprobs[old][count:], strict=True)
            )
            drawn_after = dict(
                zip(after.entry_ids[new][count:].tolist(), after.entry_logprobs[new][count:], strict=True)
            )
            assert drawn_after == pytest.approx({n: w + np.log(growth) for n, w in drawn_before.items()}, abs=0.05)
    assert softened == report.softened > 0 and report.dropped == 0
    assert report.targets == sum(entry.target_tokens for entry in source.manifest)


def test_draws_stay_unbiased_for_the_softened_distribution() -> None:
    """Means over many independent draws of the same distribution, softened with the same noise."""
    rng, num_exact, draws, repeats = np.random.default_rng(3), 3, 6, 4000
    p_V = np.sort(rng.dirichlet(np.full(V, 0.3)))[::-1]
    rest = p_V[num_exact:].sum()
    counts_RV = rng.multinomial(draws, p_V[num_exact:] / rest, size=repeats)
    sums_V = np.zeros(V)
    law = Law(1.5, 0.4, 1.0)
    for counts_V in counts_RV:
        ids = np.concatenate([np.arange(num_exact), num_exact + np.flatnonzero(counts_V)]).astype(np.int32)
        weights = np.concatenate([p_V[:num_exact], counts_V[counts_V > 0] * rest / draws])
        kept, numbers = np.array([0, len(ids)], np.int32), unknown(2)
        sequence = Sequences(
            token_ids=np.array([1, 0], np.int32), offsets=np.array([0, 2]), target_mask=np.array([False, True]),
            logprob=np.log(p_V[[0, 0]]).astype(np.float32), rank=numbers.rank, entropy=numbers.entropy,
            log_tail=np.array([np.nan, np.log(rest)], np.float32), num_exact=np.array([0, num_exact], np.int32),
            num_kept=kept, entry_offsets=np.array([0, 0, len(ids)]), entry_ids=ids,
            entry_logprobs=np.log(weights).astype(np.float32), draw_logprobs=None,
        )  # fmt: skip
        soft = soften_sequences(
            sequence, np.array([0.0, 0.8]), V, law, [np.random.default_rng(5)], draws=True
        ).sequences
        np.add.at(sums_V, soft.entry_ids, np.exp(soft.entry_logprobs.astype(np.float64)))
        assert not draw_mask(soft.num_exact, soft.num_kept - soft.num_exact)[:num_exact].any()
    mean_V, soft_rest = sums_V / repeats, np.exp(float(soft.log_tail[1]))
    assert mean_V[:num_exact].sum() + soft_rest == pytest.approx(1, abs=1e-6)
    expected_V = p_V[num_exact:] / rest * soft_rest
    error_V = np.sqrt(expected_V * (soft_rest - expected_V) / draws / repeats)
    assert (np.abs(mean_V[num_exact:] - expected_V) < 5 * error_V + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_surely_private_is_dropped(kind: str, sources: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    source = sources[kind]
    result, report = softer(source, tmp_path / "soft")
    assert report.dropped > 0 and report.softened == 0
    by_id = {row: n for n, row in enumerate(source.index(["id"])["id"].to_pylist())}
    for number, row_id in enumerate(result.index(["id"])["id"].to_pylist()):
        after, private_T = result.take(np.array([number])), private_tokens(source, by_id[row_id])
        assert not after.target_mask[private_T].any() and not after.num_kept[private_T].any()
        assert np.isnan(after.logprob[private_T]).all() and (after.rank[private_T] == 0).all()
    left = sum(entry.target_tokens for entry in result.manifest)
    assert left == report.targets - report.dropped
    assert not verify(result, deep=True)


def test_a_plan_says_how_likely_each_position_is_private(sources: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    source = kdata.open(sources["threshold"].path)
    weight = "case when position = 1 then 0.95 else 0.5 end as weight"
    query = f"select id, position, {weight} from tokens where target and position < 3"
    kdata.select(source, All(name="private", positions=SqlPositions(sql=query)))
    _, report = soften(tmp_path / "soft", source, SoftenConfig(plan="private"))
    rows = source.num_rows
    assert report.dropped == rows and 0 < report.softened <= rows
    half = query.replace("0.95", "3.0")
    kdata.select(source, All(name="wrong", positions=SqlPositions(sql=half)))
    kdata.select(source, All(name="rows_only"))
    nothing = {"temperature_rise": 0, "noise": 0}
    only_drops, dropped = soften(tmp_path / "drops", source, SoftenConfig(plan="private", **nothing))
    assert dropped.dropped == rows and dropped.softened == 0
    for row in range(rows):
        before, after = source.take(np.array([row])), only_drops.take(np.array([row]))
        np.testing.assert_array_equal(after.rank[2:], before.rank[2:])
        np.testing.assert_array_equal(after.entropy[2:], before.entropy[2:])
        np.testing.assert_array_equal(after.num_kept[2:], before.num_kept[2:])
    with pytest.raises(ConfigError, match=r"drops nothing: its likelihoods are at most 0\.95"):
        soften(tmp_path / "no", source, SoftenConfig(plan="private", drop_above=0.95, **nothing))
    with pytest.raises(DataError, match="a weight of 3"):
        soften(tmp_path / "no", source, SoftenConfig(plan="wrong"))
    with pytest.raises(ConfigError, match="chooses rows and no positions"):
        soften(tmp_path / "no", source, SoftenConfig(plan="rows_only"))
    assert not (tmp_path / "no").exists()


def test_noise_follows_from_the_key_alone(sources: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    source, key = sources["hybrid"], tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    settings = {"likelihood": 0.8}
    one, two, other = (
        softer(source, tmp_path / name, **settings, **more)[0]
        for name, more in (("one", {"key_file": str(key)}), ("two", {"key_file": str(key)}), ("other", {}))
    )
    payloads = [[v for k, v in digests(d.path).items() if k.startswith("data/")] for d in (one, two, other)]
    assert payloads[0] == payloads[1] != payloads[2]
    recorded = json.loads((one.path / "dataset.json").read_text())
    assert "fox" not in json.dumps(recorded) and str(key) not in json.dumps(recorded)
    with pytest.raises(MismatchError, match="noise"):
        softer(source, tmp_path / "one", **settings, noise=0.1, key_file=str(key))


def published(dataset: kdata.Dataset) -> str:
    """All of dataset.json, as text."""
    return (dataset.path / "dataset.json").read_text()


@pytest.mark.parametrize("with_key", [True, False])
def test_a_short_secret_is_not_found_by_trying_all(
    with_key: bool, corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Every pattern of four digits, by each digest that can be made of it without the key."""
    row = {"id": "r", "domain": "a", "text": "my pin is 4815 and the cat sat", "source": "s", "license": "CC0"}
    corpus = write_jsonl(tmp_path / "c.jsonl", [row])
    source = run_capture(tmp_path / "source", corpus, tokenizer_dir, kind="topk", k=12)
    (tmp_path / "key").write_bytes(bytes(range(32)))
    key = {"key_file": str(tmp_path / "key")} if with_key else {}
    result, _ = softer(source, tmp_path / "soft", patterns=["4815"], likelihood=0.5, **key)
    text = published(result)
    for number in range(10**4):
        pattern = f"{number:04}"
        private = {"patterns": [pattern], "positions": None, "likelihood": 0.5}
        content = canonical_json(private)
        digests_of = [
            json_digest(private),
            json_digest([pattern]),
            hashlib.sha256(pattern.encode()).hexdigest(),
            hmac.digest(b"", b"kdata soften\0" + content, "sha256").hex(),
        ]
        assert not any(digest in text for digest in digests_of), "the pattern can be found from what is published"


def test_a_resume_has_to_have_the_same_key_and_patterns(
    sources: dict[str, kdata.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = kdata.open(sources["hybrid"].path)
    query = "select id, position from tokens where target and position < 3"
    kdata.select(source, All(name="keyed", positions=SqlPositions(sql=query)))
    keys = []
    for number in range(2):
        (tmp_path / f"key{number}").write_bytes(bytes([number]) * 32)
        keys.append({"key_file": str(tmp_path / f"key{number}")})
    settings: dict[str, Any] = {"likelihood": 0.8}

    def stop_in_the_second_shard(root: Path, **more: Any) -> None:
        real = soften_module._unit

        def stopping(work: Any, number: int, report: SoftenReport) -> Any:
            if number == 1:
                raise KeyboardInterrupt
            return real(work, number, report)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(soften_module, "_unit", stopping)
            softer(source, root, **{**settings, **more})

    for name, private in (("patterns", {}), ("plan", {"patterns": [], "plan": "keyed"})):
        stop_in_the_second_shard(tmp_path / name, **private, **keys[0])
        for other in (keys[1], {}):
            with pytest.raises(MismatchError):
                softer(source, tmp_path / name, **settings, **private, **other)
        resumed, _ = softer(source, tmp_path / name, **settings, **private, **keys[0])
        whole, _ = softer(source, tmp_path / f"{name}-whole", **settings, **private, **keys[0])
        assert digests(resumed.path) == digests(whole.path)
    with pytest.raises(MismatchError, match="private_digest"):
        softer(source, tmp_path / "patterns", **settings, patterns=["dog"], **keys[0])
    stop_in_the_second_shard(tmp_path / "bare")
    for other in ({}, keys[0]):
        with pytest.raises(MismatchError, match=r"key|private_digest"):
            softer(source, tmp_path / "bare", **settings, **other)
    stop_in_the_second_shard(tmp_path / "random", patterns=[], plan="keyed")
    random, _ = softer(source, tmp_path / "random", **settings, patterns=[], plan="keyed")
    assert not verify(random, deep=True), "what is private by a plan is no secret, so this goes on with other noise"


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        ("sampled", {}, DataError, "kind sampled"),
        ("topk", {"patterns": []}, ConfigError, "nothing says what is private"),
        ("topk", {"patterns": ["no such text"]}, DataError, "no text of .* matches pattern 1 of 1"),
        ("topk", {"patterns": ["dog", "no such text"]}, DataError, "no text of .* matches pattern 2 of 2"),
        ("topk", {"patterns": ["dog", r"\b"]}, DataError, "no text of .* matches pattern 2 of 2"),
        ("topk", {"key_file": "nowhere"}, MissingError, "nowhere"),
        ("topk", {"key_file": __file__[:-8] + "soften.py", "plan": "absent"}, KdataError, "absent"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    kind: str, settings: dict[str, Any], error: type[Exception], message: str, sources: dict[str, kdata.Dataset],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        softer(sources[kind], tmp_path / "soft", **settings)
    assert not (tmp_path / "soft").exists()


def test_a_key_that_can_be_guessed_and_a_wrong_pattern_are_refused(
    sources: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("secret")
    with pytest.raises(ConfigError, match="6 bytes"):
        softer(sources["topk"], tmp_path / "soft", key_file=str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="the result needs a folder of its own"):
        softer(sources["topk"], sources["topk"].path)
    for pattern in ("(", "", "(?P<name>a)", "x*", "dog|"):
        with pytest.raises(ValueError, match="pattern"):
            SoftenConfig(patterns=[pattern])


def test_a_pattern_without_a_match_is_refused_beside_a_plan_and_not_repeated(
    sources: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    source = kdata.open(sources["topk"].path)
    query = "select id, position from tokens where target and position < 3"
    kdata.select(source, All(name="beside", positions=SqlPositions(sql=query)))
    with pytest.raises(DataError, match="matches pattern 1 of 1") as caught:
        softer(source, tmp_path / "soft", plan="beside", patterns=["4851"])
    assert "4851" not in str(caught.value) and not (tmp_path / "soft").exists()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"patterns": ["dog"], "drop_above": 1}, True),
        ({"patterns": ["dog"], "likelihood": 0.5}, True),
        ({"plan": "private", "drop_above": 1}, True),
        ({"patterns": ["dog"]}, False),
        ({"plan": "private", "likelihood": 0.5}, False),
        ({"patterns": ["dog"], "drop_above": 1, "noise": 0.1}, False),
        ({"patterns": ["dog"], "drop_above": 1, "temperature_rise": 0.1}, False),
    ],
)
def test_settings_that_change_nothing_are_refused(settings: dict[str, Any], refused: bool) -> None:
    values = {"temperature_rise": 0, "noise": 0, **settings}
    if refused:
        with pytest.raises(ConfigError, match="soften nothing"):
            parse_config(SoftenConfig, values, "soften settings")
    else:
        parse_config(SoftenConfig, values, "soften settings")


def test_a_match_of_no_byte_makes_nothing_private(sources: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    settings = {"likelihood": 0.5, "drop_above": 1.0}
    plain, bounded = (
        softer(sources["topk"], tmp_path / str(number), patterns=[pattern], **settings)[1]
        for number, pattern in enumerate(["dog", r"dog|\b"])
    )
    assert plain == bounded and plain.softened > 0
