"""The average of sparse distributions, against dense float64 ones: every formula of kdata/mixture.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.errors import DataError
from kdata.format.sequences import Sequences
from kdata.jobs.average import mix


def payload(positions: list[tuple[np.ndarray, list[int], dict[int, float]]]) -> Sequences:
    """One row of T positions behind an unrecorded one: dense p [V], ids that are kept exactly, and draws with their weights.

    The actual token is always 1.
    """
    exact = [sorted(ids, key=lambda i, p=p: (-p[i], i)) for p, ids, _ in positions]
    drawn = [sorted(draws) for _, _, draws in positions]
    counts = np.array([0, *map(len, exact)], np.int32), np.array([0, *map(len, drawn)], np.int32)
    weights = [
        w
        for (p, _, draws), ids, drawn_ids in zip(positions, exact, drawn, strict=True)
        for w in (*p[ids], *(draws[i] for i in drawn_ids))
    ]
    with np.errstate(divide="ignore"):
        tail = [np.log(max(1 - p[ids].sum(), 0.0)) for (p, _, _), ids in zip(positions, exact, strict=True)]
    tokens, num_kept = len(positions) + 1, counts[0] + counts[1]
    return Sequences(
        token_ids=np.ones(tokens, np.int32),
        offsets=np.array([0, tokens]),
        target_mask=np.arange(tokens) > 0,
        logprob=np.array([np.nan, *(np.log(p[1]) for p, _, _ in positions)], np.float32),
        rank=np.array([0, *((p > p[1]).sum() + 1 for p, _, _ in positions)], np.int32),
        log_tail=np.array([np.nan, *tail], np.float32),
        entropy=np.array([np.nan, *(-(p * np.log(p)).sum() for p, _, _ in positions)], np.float32),
        num_exact=counts[0],
        num_kept=num_kept,
        log_z=None,
        entry_offsets=np.concatenate(([0], np.cumsum(num_kept, dtype=np.int64))),
        entry_ids=np.array([i for a, b in zip(exact, drawn, strict=True) for i in (*a, *b)], np.int32),
        entry_logprobs=np.log(np.array(weights)).astype(np.float32),
        draw_logprobs=None,
    )


def entries(sequences: Sequences, t: int) -> tuple[dict[int, float], dict[int, float]]:
    """Exact entries and draws of a position: id to weight. They must stand in the order that the format asks for."""
    span = slice(sequences.entry_offsets[t], sequences.entry_offsets[t + 1])
    ids = sequences.entry_ids[span].tolist()
    weights = np.exp(sequences.entry_logprobs[span].astype(np.float64)).tolist()
    split = int(sequences.num_exact[t])
    assert weights[:split] == sorted(weights[:split], reverse=True) and ids[split:] == sorted(set(ids[split:]))
    assert len(set(ids)) == len(ids) == sequences.num_kept[t]
    return dict(zip(ids[:split], weights[:split], strict=True)), dict(zip(ids[split:], weights[split:], strict=True))


def distribution(rng: np.random.Generator, vocab: int) -> np.ndarray:
    logits = 2.5 * rng.standard_normal(vocab)
    return np.exp(logits) / np.exp(logits).sum()


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[np.ndarray]], list[list[int]], np.ndarray]:
    """Dense distributions [M][T][V], how many are kept of each, and shares [M], some of them 0."""
    teachers, tokens, vocab = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(3, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shares = np.array(draw(st.lists(st.integers(0, 4), min_size=teachers, max_size=teachers).filter(any)), np.float64)
    kept = [[int(rng.integers(1, vocab + 1)) for _ in range(tokens)] for _ in range(teachers)]
    return [[distribution(rng, vocab) for _ in range(tokens)] for _ in range(teachers)], kept, shares / shares.sum()


@given(problems())
def test_tails_average_to_tails_and_kept_entries_are_the_known_part_on_the_union(
    problem: tuple[list[list[np.ndarray]], list[list[int]], np.ndarray],
) -> None:
    """Also: the sum is 1, nothing exceeds the dense average, and the bound of what is unknown holds."""
    dense, kept, shares = problem
    tops = [
        [np.argsort(-p)[:k].tolist() for p, k in zip(ps, ks, strict=True)] for ps, ks in zip(dense, kept, strict=True)
    ]
    members = [
        payload([(p, ids, {}) for p, ids in zip(ps, own, strict=True)]) for ps, own in zip(dense, tops, strict=True)
    ]
    mixture = mix(members, shares[None, :], "ghost")
    mixed = mixture.sequences
    assert mixed.num_kept[0] == 0 and np.isnan(mixed.log_tail[0]) and np.isnan(mixed.logprob[0])
    for t in range(len(dense[0])):
        live = [m for m in range(len(shares)) if shares[m] > 0]
        p = sum(shares[m] * dense[m][t] for m in live)
        union = {i for m in live for i in tops[m][t]}
        exact, drawn = entries(mixed, t + 1)
        assert exact.keys() == union and not drawn
        for token, weight in exact.items():
            known = sum(shares[m] * dense[m][t][token] for m in live if token in tops[m][t])
            assert weight == pytest.approx(known, rel=1e-5)
            assert weight <= p[token] * (1 + 1e-5)
        tail = np.exp(np.float64(mixed.log_tail[t + 1]))
        assert sum(exact.values()) + tail == pytest.approx(1.0, abs=1e-5)
        assert mixed.logprob[t + 1] == pytest.approx(np.log(p[1]), rel=1e-5)
        unknown = sum(p[token] - weight for token, weight in exact.items())
        assert unknown <= mixture.unknown[t + 1] + 1e-5 <= tail + 2e-5
        assert mixture.unknown[t + 1] == pytest.approx(bound(dense, tops, shares, t, union), abs=1e-5)


def bound(
    dense: list[list[np.ndarray]], tops: list[list[list[int]]], shares: np.ndarray, t: int, union: set[int]
) -> float:
    """sum_m w_m min(tail_m, |U outside K_m| c_m), written out."""
    total = 0.0
    for m, share in enumerate(shares):
        own = dense[m][t][tops[m][t]]
        total += share * min(1 - own.sum(), len(union - set(tops[m][t])) * own.min()) if share else 0.0
    return total


def outcomes(p: np.ndarray, k: int, draws: int, tau: float) -> list[tuple[float, list[int], dict[int, float]]]:
    """Everything that a capture of p may keep: its probability, exact ids, weights of draws."""
    top = np.argsort(-p)[:k].tolist()
    rest = [i for i in range(len(p)) if i not in top]
    share = p[rest] ** tau / (p[rest] ** tau).sum()
    possible = []
    for picked in itertools.product(range(len(rest)), repeat=draws):
        weights = {rest[i]: picked.count(i) / draws * p[rest[i]] / share[i] for i in set(picked)}
        possible.append((float(np.prod(share[list(picked)])), top, weights))
    return possible


@pytest.mark.parametrize("kinds", [((1, 2), (1, 2)), ((2, 1), (1, 2)), ((0, 3), (1, 2)), ((0, 2), (0, 2))])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_draws_average_to_an_unbiased_estimate_by_enumeration(kinds: tuple[tuple[int, int], ...], tau: float) -> None:
    """The expectation over everything that two captures may draw is the dense average, for hybrid and sampled alike."""
    rng = np.random.default_rng(3)
    shares = np.array([0.3, 0.7])
    dense = [distribution(rng, 5) for _ in shares]
    p = shares @ np.array(dense)
    expected, total = np.zeros(5), 0.0
    for one, two in itertools.product(*(outcomes(q, k, n, tau) for q, (k, n) in zip(dense, kinds, strict=True))):
        members = [payload([(q, ids, draws)]) for q, (_, ids, draws) in zip(dense, (one, two), strict=True)]
        mixed = mix(members, shares[None, :], "draws").sequences
        exact, drawn = entries(mixed, 1)
        assert exact.keys() == set(one[1]) & set(two[1])
        assert list(exact.values()) == pytest.approx([p[i] for i in exact], rel=1e-5)
        assert np.exp(mixed.log_tail[1]) == pytest.approx(1 - sum(p[i] for i in exact), rel=1e-5)
        if tau == 1.0:
            assert sum(exact.values()) + sum(drawn.values()) == pytest.approx(1.0, rel=1e-5)
        for token, weight in (exact | drawn).items():
            expected[token] += one[0] * two[0] * weight
        total += one[0] * two[0]
    assert total == pytest.approx(1.0)
    np.testing.assert_allclose(expected, p, rtol=1e-5)


@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_the_average_of_one_teacher_is_its_payload(tail: str) -> None:
    rng = np.random.default_rng(0)
    draws = {3: 0.1, 4: 0.05} if tail == "draws" else {}
    rows = [payload([(distribution(rng, 6), [0, 2], draws) for _ in range(3)]) for _ in range(2)]
    mixture = mix(rows, np.array([[0.0, 1.0]]), tail)  # type: ignore[arg-type]
    for name, values in vars(rows[1]).items():
        averaged = getattr(mixture.sequences, name)
        assert values is averaged is None or np.array_equal(values, averaged, equal_nan=True), name
    assert not mixture.unknown.any()


def test_rank_and_entropy_of_a_true_average_are_marked_unknown() -> None:
    rng = np.random.default_rng(0)
    rows = [payload([(distribution(rng, 6), [0], {})]) for _ in range(2)]
    mixed = mix(rows, np.array([[0.5, 0.5]]), "ghost").sequences
    assert mixed.rank.tolist() == [0, 0] and np.isnan(mixed.entropy).all()
    assert np.isfinite(mixed.logprob[1])


def test_each_row_has_its_own_shares() -> None:
    """Two rows of one position each; and a position that one payload has not recorded stays unrecorded."""
    rng = np.random.default_rng(1)
    one, two = (payload([(distribution(rng, 4), [0, 1], {}), (distribution(rng, 4), [2], {})]) for _ in range(2))
    halves = [replace(s, offsets=np.array([0, 2, 3]), target_mask=np.array([False, True, False])) for s in (one, two)]
    mixed = mix(halves, np.array([[1.0, 0.0], [0.25, 0.75]]), "ghost").sequences
    assert entries(mixed, 1)[0] == pytest.approx(entries(one, 1)[0])
    assert entries(mixed, 2)[0][2] == pytest.approx(
        0.25 * entries(one, 2)[0][2] + 0.75 * entries(two, 2)[0][2], rel=1e-5
    )
    empty = replace(
        halves[1], num_exact=np.array([0, 2, 0], np.int32), num_kept=np.array([0, 2, 0], np.int32),
        entry_offsets=np.array([0, 0, 2, 2]), entry_ids=two.entry_ids[:2], entry_logprobs=two.entry_logprobs[:2],
        log_tail=np.array([np.nan, two.log_tail[1], np.nan], np.float32),
    )  # fmt: skip
    mixed = mix([halves[0], empty], np.array([[0.5, 0.5], [0.5, 0.5]]), "ghost").sequences
    assert mixed.num_kept.tolist() == [0, 2, 0] and np.isnan(mixed.log_tail[2]) and np.isnan(mixed.logprob[2])
    with pytest.raises(DataError, match="one of the payloads has nothing recorded"):
        mix([replace(s, target_mask=one.target_mask) for s in (halves[0], empty)], np.full((2, 2), 0.5), "ghost")
