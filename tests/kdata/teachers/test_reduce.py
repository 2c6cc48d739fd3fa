"""The reduction of logits: against a dense float64 oracle, compiled against torch, chunks against one piece."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdata.errors import TeacherError
from kdata.format.keep import KeepConfig
from kdata.format.kept import segment_sum
from kdata.format.schema import CodecInfo
from kdata.teachers import reduce
from kdata.teachers.head import Head
from kdata.teachers.reduce import Reduced, draw_seed, draws_of, reduce_chunks, reduce_logits, rows_of_chunk, uniforms_of

KEEPS = [
    KeepConfig(kind="topk", k=7),
    KeepConfig(kind="adaptive", k=40, mass=0.9, min_k=2),
    KeepConfig(kind="sampled", num_draws=50),
    KeepConfig(kind="hybrid", k=5, num_draws=9),
    KeepConfig(kind="hybrid", k=5, num_draws=9, tau=0.7),
    KeepConfig(kind="hybrid", k=5, num_draws=9, temperatures=[2.0, 0.5]),
    KeepConfig(kind="sampled", num_draws=50, draw_method="independent"),
    KeepConfig(kind="threshold", threshold=0.03, temperatures=[2.0]),
]


def logits_of(seed: int, positions: int, vocab: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(positions, vocab, generator=generator) * spread,
        torch.randint(0, vocab, (positions,), generator=generator),
    )


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "_reduce_cpu", reduce._reduce_torch)


@pytest.mark.parametrize("keep", KEEPS, ids=lambda k: f"{k.kind}-{k.tau}-{len(k.temperatures)}")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), positions=st.integers(1, 40), spread=st.sampled_from([0.3, 2.0, 8.0]))
def test_every_number_equals_the_dense_oracle(keep: KeepConfig, seed: int, positions: int, spread: float) -> None:
    logits_MV, actual_M = logits_of(seed, positions, 257, spread)
    dense = torch.log_softmax(logits_MV.double(), -1).numpy()
    out = reduce_logits(logits_MV, actual_M, keep, seed)
    own = dense[np.arange(positions), actual_M.numpy()]
    np.testing.assert_allclose(out.logprob, own, atol=2e-5)
    np.testing.assert_array_equal(out.rank, (dense > own[:, None]).sum(1) + 1)
    np.testing.assert_allclose(out.entropy, -(np.exp(dense) * dense).sum(1), atol=2e-5)
    for number, temperature in enumerate(keep.temperatures):
        expected = np.log(np.exp(dense / temperature).sum(1))
        np.testing.assert_allclose(out.log_z[:, number], expected, atol=2e-5)
    begin = 0
    for row, (exact, count) in enumerate(zip(out.kept.num_exact, out.kept.num_kept, strict=True)):
        ids, logprobs = out.kept.ids[begin : begin + count], out.kept.logprobs[begin : begin + count]
        begin += count
        assert len(set(ids.tolist())) == count
        assert (np.diff(logprobs[:exact]) <= 0).all() and (np.diff(ids[exact:]) > 0).all()
        np.testing.assert_allclose(logprobs[:exact], dense[row, ids[:exact]], atol=2e-5)
        np.testing.assert_allclose(np.sort(dense[row])[::-1][:exact], logprobs[:exact], atol=2e-5)
        rest = np.delete(dense[row], ids[:exact])
        np.testing.assert_allclose(out.log_tail[row], min(np.log(np.exp(rest).sum()), 0.0), atol=2e-5)


@pytest.mark.parametrize(
    "keep", [KEEPS[0], KEEPS[2], KEEPS[3], KEEPS[5], KEEPS[7]], ids=lambda k: f"{k.kind}-{len(k.temperatures)}"
)
def test_the_compiled_kernel_equals_torch(keep: KeepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_MV, actual_M = logits_of(3, 200, 1000, 2.5)
    compiled = reduce_logits(logits_MV, actual_M, keep, 11)
    in_torch(monkeypatch)
    plain = reduce_logits(logits_MV, actual_M, keep, 11)
    for name in ("logprob", "log_tail", "entropy"):
        np.testing.assert_allclose(getattr(compiled, name), getattr(plain, name), atol=1e-5)
    np.testing.assert_array_equal(compiled.rank, plain.rank)
    np.testing.assert_array_equal(compiled.kept.num_exact, plain.kept.num_exact)
    # A uniform within rounding of a border between two ids may fall either way: at most one draw in a thousand here.
    assert abs(len(compiled.kept.ids) - len(plain.kept.ids)) <= len(plain.kept.ids) // 1000


@pytest.mark.parametrize("keep", KEEPS, ids=lambda k: f"{k.kind}-{k.tau}-{len(k.temperatures)}")
def test_chunks_do_not_matter(keep: KeepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_MV, actual_M = logits_of(5, 50, 300, 2.0)
    whole = reduce_logits(logits_MV, actual_M, keep, 1)
    monkeypatch.setitem(reduce.CHUNK_BYTES, "cpu", 300 * 4 * 7)
    pieces = reduce_logits(logits_MV, actual_M, keep, 1)
    assert_same(whole, pieces)


def test_draws_depend_on_the_sequence_alone() -> None:
    keep = KeepConfig(kind="hybrid", k=4, num_draws=12)
    logits_MV, actual_M = logits_of(7, 30, 300, 2.0)
    both = reduce_chunks(lambda a, b: logits_MV[a:b], 300, actual_M, keep, [(10, 111), (20, 222)])
    second = reduce_logits(logits_MV[10:], actual_M[10:], keep, 222)
    np.testing.assert_array_equal(both.kept.ids[-len(second.kept.ids) :], second.kept.ids)
    ids = np.arange(5, dtype=np.int32)
    assert draw_seed(ids, keep) == draw_seed(ids.astype(np.int64), keep) != draw_seed(ids[::-1], keep)


CONTEXTS = [kept.model_copy(update={"draws_by": "context"}) for kept in (KEEPS[2], KEEPS[3], KEEPS[4], KEEPS[7])]


@pytest.mark.parametrize("keep", CONTEXTS, ids=lambda k: f"{k.kind}-{k.tau}-{k.draw_method}")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_draws_by_context_depend_on_the_tokens_before_alone(keep: KeepConfig, data: st.DataObject) -> None:
    """Whatever follows, however the positions are grouped, from whatever start: equal contexts have equal uniforms."""
    ids = st.lists(st.integers(0, 5), max_size=6)
    common, first, second = data.draw(ids), data.draw(ids), data.draw(ids)
    a, b = (np.array([7, *common, *rest, 9], np.int32) for rest in (first, second))
    seeds = draws_of(a, 1, keep)
    assert isinstance(seeds, np.ndarray) and len(seeds) == len(a) - 1
    start = data.draw(st.integers(1, len(a) - 1))
    np.testing.assert_array_equal(draws_of(a, start, keep, data.draw(st.integers(0, 3))), seeds[start - 1 :])
    seed_of = {a[:place].tobytes(): seed for place, seed in enumerate(seeds, 1)}
    for place, seed in enumerate(draws_of(b, 1, keep), 1):
        assert seed_of.setdefault(b[:place].tobytes(), seed) == seed
    assert len(set(seed_of.values())) == len(seed_of)
    whole = uniforms_of([(len(a) - 1, seeds)], keep)
    parts = [uniforms_of([(1, seeds[n : n + 1])], keep) for n in range(len(seeds))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (np.diff(whole, axis=1) >= 0).all() and (whole >= 0).all() and (whole < 1).all()


@pytest.mark.parametrize("keep", CONTEXTS, ids=lambda k: f"{k.kind}-{k.tau}-{k.draw_method}")
def test_draws_by_context_are_unbiased_over_contexts(keep: KeepConfig) -> None:
    """Mean weight over many contexts against p, for a random test function: within four standard errors."""
    logits_MV, actual_M = logits_of(9, 1, 60, 1.5)
    p = torch.softmax(logits_MV[0].double(), -1).numpy()
    values, repeats = np.random.default_rng(0).normal(size=60), 4000
    seeds = draws_of(np.random.default_rng(1).integers(0, 60, repeats + 1).astype(np.int32), 1, keep)
    logits = lambda a, b: logits_MV.expand(repeats, 60)[a:b].clone()  # noqa: E731
    kept = reduce_chunks(logits, 60, actual_M.expand(repeats), keep, [(repeats, seeds)]).kept
    means = segment_sum(np.exp(kept.logprobs.astype(np.float64)) * values[kept.ids], kept.num_kept)
    assert abs(means.mean() - p @ values) < 4 * means.std(ddof=1) / np.sqrt(repeats)


@pytest.mark.parametrize(
    "keep", [KEEPS[2], KEEPS[3], KEEPS[4], KEEPS[6], KEEPS[7]], ids=lambda k: f"{k.kind}-{k.tau}-{k.draw_method}"
)
def test_weights_are_unbiased(keep: KeepConfig) -> None:
    """Mean weight over many draws against p, for a random test function: within four standard errors."""
    logits_MV, actual_M = logits_of(9, 1, 60, 1.5)
    p = torch.softmax(logits_MV[0].double(), -1).numpy()
    values = np.random.default_rng(0).normal(size=60)
    repeats = 4000
    kept = reduce_chunks(
        lambda a, b: logits_MV.expand(repeats, 60)[a:b].clone(), 60, actual_M.expand(repeats), keep,
        [(1, seed) for seed in range(repeats)],
    ).kept  # fmt: skip
    means = segment_sum(np.exp(kept.logprobs.astype(np.float64)) * values[kept.ids], kept.num_kept)
    error = means.std(ddof=1) / np.sqrt(repeats)
    assert abs(means.mean() - p @ values) < 4 * error


@pytest.mark.parametrize("keep", [KEEPS[2], KEEPS[3]], ids=lambda k: k.kind)
def test_systematic_draws_take_each_id_its_expected_number_of_times_rounded_down_or_up(keep: KeepConfig) -> None:
    logits_MV, actual_M = logits_of(11, 40, 300, 2.0)
    p = torch.softmax(logits_MV.double(), -1).numpy()
    if keep.num_exact:
        np.put_along_axis(p, np.argsort(-p, -1)[:, : keep.num_exact], 0.0, -1)
    share = p / p.sum(-1, keepdims=True)
    kept = reduce_logits(logits_MV, actual_M, keep, 5).kept
    drawn = kept.is_draw
    position = np.repeat(np.arange(40), kept.num_drawn)
    weights = np.zeros_like(p)
    weights[position, kept.ids[drawn]] = np.exp(kept.logprobs[drawn].astype(np.float64))
    counts = weights / weights.sum(-1, keepdims=True) * keep.num_draws
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    assert (np.abs(counts - share * keep.num_draws) < 1 + 1e-4).all()


def test_systematic_draws_have_less_noise_than_independent_ones() -> None:
    """The mean square error of the weights over 300 seeds, against what the formulas of kdata/keep.py say of each."""
    logits_MV, _ = logits_of(9, 1, 60, 1.5)
    p, draws, repeats = torch.softmax(logits_MV[0].double(), -1).numpy(), 20, 300
    errors = {}
    for method in ("systematic", "independent"):
        keep = KeepConfig(kind="sampled", num_draws=draws, draw_method=method)
        total = 0.0
        for seed in range(repeats):
            kept = reduce_logits(logits_MV, torch.zeros(1, dtype=torch.long), keep, seed).kept
            weights = np.zeros(60)
            weights[kept.ids] = np.exp(kept.logprobs.astype(np.float64))
            total += ((weights - p) ** 2).sum() / repeats
        errors[method] = total
    fraction = draws * p % 1
    assert errors["systematic"] == pytest.approx((fraction * (1 - fraction)).sum() / draws**2, rel=0.05)
    assert errors["independent"] == pytest.approx((p * (1 - p)).sum() / draws, rel=0.05)
    assert errors["systematic"] < 0.7 * errors["independent"]


def by_threshold(logits_V: np.ndarray, threshold: float, shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition, in float64: exact ids, drawn ids, and how often each was drawn."""
    p_V = np.exp(logits_V.astype(np.float64) - np.logaddexp.reduce(logits_V.astype(np.float64)))
    falling = np.argsort(-logits_V, kind="stable")
    exact = falling[: max(1, int((p_V >= threshold).sum()))]
    rest_V = p_V.copy()
    rest_V[exact] = 0
    tail = rest_V.sum()
    if tail == 0:
        return exact, exact[:0], exact[:0]
    number = max(1, math.ceil(tail / threshold))
    drawn = np.searchsorted(
        np.cumsum(rest_V), (np.arange(number) + shift) / number * np.cumsum(rest_V)[-1], side="right"
    )
    return exact, *np.unique(drawn, return_counts=True)


@pytest.mark.parametrize("way", ["compiled", "torch"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([2, 3, 63, 64, 65, 259, 1000]),
    threshold=st.floats(0.004, 0.999),
    spread=st.sampled_from([0.0, 0.5, 2.0, 6.0, 60.0]),
)
def test_draws_by_need_are_those_of_the_definition(
    way: str, seed: int, vocab: int, threshold: float, spread: float
) -> None:
    """At every position: which ids are exact, which are drawn, how often, how many there are, and that weights sum to 1."""
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((5, vocab)) * spread).astype(np.float32)
    keep = KeepConfig(kind="threshold", threshold=threshold)
    with pytest.MonkeyPatch.context() as patched:
        if way == "torch":
            in_torch(patched)
        out = reduce_logits(torch.from_numpy(z), torch.zeros(5, dtype=torch.long), keep, seed)
    shifts = uniforms_of([(5, seed)], keep)
    assert shifts.shape == (5, 1)
    kept, begin, differ = out.kept, 0, 0
    for row in range(5):
        exact, count = kept.num_exact[row], kept.num_kept[row]
        ids, weights = kept.ids[begin : begin + count], np.exp(kept.logprobs[begin : begin + count].astype(np.float64))
        begin += count
        assert 1 <= exact <= keep.num_exact and count - exact <= keep.most_draws and count <= 1 / threshold + 2
        assert weights.sum() == pytest.approx(1.0, abs=1e-5)
        share = weights[exact:] / np.exp(np.float64(out.log_tail[row]))
        if count > exact:
            counts = share / share.min()
            np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
            assert counts.max() < 2.5, "an id below the threshold was drawn three times"
        wanted, drawn_ids, counts = by_threshold(z[row], threshold, shifts[row, 0])
        p_V = np.exp(z[row].astype(np.float64) - z[row].max())
        if np.delete(p_V, wanted).sum() < np.finfo(np.float32).tiny * p_V.sum():  # a float32 may hold it, or 0
            assert np.array_equal(ids[:exact], wanted)
            continue
        # Of equal ids torch may take any; a probability, or a shift, within rounding of a border may fall on either side.
        if spread == 0 or not (np.array_equal(ids[:exact], wanted) and np.array_equal(ids[exact:], drawn_ids)):
            differ += spread > 0
            continue
        np.testing.assert_allclose(share, counts / max(counts.sum(), 1), rtol=1e-4)
    assert differ <= 1


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_ids_at_the_threshold_are_exact_and_the_first_is_wherever_it_lies(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        in_torch(monkeypatch)
    z = torch.full((3, 6), -torch.inf)
    z[0, :4], z[1], z[2, 0] = 0, 0, 0  # four ids at a quarter, six at a sixth, and a certain one
    for threshold, exact, drawn in (
        (0.25, [4, 1, 1], [0, 4, 0]), (1 / 6, [4, 6, 1], [0, 0, 0]), (0.9, [1, 1, 1], [1, 1, 0]),
    ):  # fmt: skip
        keep = KeepConfig(kind="threshold", threshold=threshold)
        out = reduce_logits(z, torch.zeros(3, dtype=torch.long), keep, 0)
        assert out.kept.num_exact.tolist() == exact and out.kept.num_drawn.tolist() == drawn, threshold
        assert (out.log_tail[out.kept.num_drawn == 0] == -np.inf).all()


def test_the_variance_of_draws_by_need_is_the_least_for_their_number() -> None:
    """Of the sum over positions, against hybrids and samples that keep as many entries on average or more."""
    logits_MV, actual_M = logits_of(2, 40, 300, 1.0)
    logits_MV *= torch.linspace(0.5, 6, 40)[:, None]  # from unsure to certain
    p = torch.softmax(logits_MV.double(), -1).numpy()

    def measured(keep: KeepConfig) -> tuple[float, float]:
        entries = error = 0.0
        for seed in range(40):
            kept = reduce_logits(logits_MV, actual_M, keep, seed).kept
            weights = np.zeros_like(p)
            weights[np.repeat(np.arange(40), kept.num_kept), kept.ids] = np.exp(kept.logprobs.astype(np.float64))
            entries, error = entries + len(kept.ids) / 40 / 40, error + ((weights - p) ** 2).sum() / 40 / 40
        return entries, error

    entries, error = measured(KeepConfig(kind="threshold", threshold=0.03))
    for other in (
        KeepConfig(kind="hybrid", k=4, num_draws=16), KeepConfig(kind="hybrid", k=8, num_draws=12),
        KeepConfig(kind="sampled", num_draws=36),
    ):  # fmt: skip
        more, worse = measured(other)
        assert entries < more and error < worse, other


@pytest.mark.parametrize(("field", "value"), [("tau", 0.8), ("draw_method", "independent")])
def test_draws_by_need_refuse_what_is_for_a_fixed_number_of_draws(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value} is for sampled and hybrid; kind threshold"):
        KeepConfig(kind="threshold", **{field: value})
    for threshold in (0.0, 0.003, 1.0):
        with pytest.raises(ValueError, match="threshold"):
            KeepConfig(kind="threshold", threshold=threshold)


def test_a_dataset_without_a_draw_method_has_independent_draws() -> None:
    """Datasets from before there was a choice: the same setting, the same draws, the same identity."""
    parameters = {"k": 4, "num_draws": 6, "tau": 1.0, "draw_seed": 3, "id_bytes": 2}
    before = CodecInfo(id="packed", version=1, kind="hybrid", parameters=parameters)
    keep = KeepConfig.of(before)
    assert keep.draw_method == "independent" and keep.codec(300).parameters == before.parameters
    today = KeepConfig(kind="hybrid", k=4, num_draws=6, draw_seed=3)
    assert today.codec(300).parameters == {**parameters, "draw_method": "systematic"}
    assert KeepConfig.of(today.codec(300)) == today
    assert "draw_method" not in KeepConfig(kind="topk").settings()


def test_a_certain_model_has_no_tail_and_no_draws() -> None:
    logits_MV = torch.full((3, 50), -200.0)
    logits_MV[:, 7] = 0.0
    out = reduce_logits(logits_MV, torch.full((3,), 7), KeepConfig(kind="hybrid", k=1, num_draws=4), 0)
    assert (out.log_tail < -80).all() and (out.rank == 1).all() and (out.kept.ids == 7).sum() == 3


def test_nothing_to_predict_gives_nothing() -> None:
    out = reduce_logits(
        torch.zeros(0, 50), torch.zeros(0, dtype=torch.long), KeepConfig(kind="hybrid", k=2, num_draws=4), 0
    )
    assert len(out.logprob) == 0 and len(out.kept.ids) == 0


def assert_same(a: Reduced, b: Reduced) -> None:
    for name in ("logprob", "rank", "log_tail", "entropy"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-6)
    np.testing.assert_array_equal(a.kept.ids, b.kept.ids)
    np.testing.assert_allclose(a.kept.logprobs, b.kept.logprobs, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 40])
def test_logits_that_are_not_numbers_are_refused(bad: float, rows: int) -> None:
    logits_MV, actual_M = logits_of(1, rows, 300, 2.0)
    logits_MV[rows - 1, 299] = bad
    with pytest.raises(TeacherError, match="NaN or infinity"):
        reduce_logits(logits_MV, actual_M, KeepConfig(), 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(2, 700),
    k=st.integers(1, 90),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    forbidden=st.floats(0, 0.9),
)
def test_the_kernel_at_any_width_with_ties_and_forbidden_ids(
    seed: int, vocab: int, k: int, spread: float, forbidden: float
) -> None:
    """Logits on a coarse grid (equal ones abound; spread 0: all equal), some of them -inf."""
    rng = np.random.default_rng(seed)
    z = np.round(rng.standard_normal((6, vocab)) * spread).astype(np.float32)
    z[rng.random(z.shape) < forbidden] = -np.inf
    z[:, 0] = 0.0  # one at least is possible, and it is what is there
    keep, actual = KeepConfig(kind="hybrid", k=min(k, vocab - 1), num_draws=20), torch.zeros(6, dtype=torch.long)
    out = reduce_logits(torch.from_numpy(z), actual, keep, seed)
    dense = z.astype(np.float64) - np.logaddexp.reduce(z.astype(np.float64), 1, keepdims=True)
    np.testing.assert_allclose(out.logprob, dense[:, 0], atol=2e-5)
    np.testing.assert_array_equal(out.rank, (z > z[:, :1]).sum(1) + 1)
    begin = 0
    for row in range(6):
        exact, count = out.kept.num_exact[row], out.kept.num_kept[row]
        ids = out.kept.ids[begin : begin + count]
        begin += count
        # The k largest, equal ones by rising id.
        np.testing.assert_array_equal(ids[:exact], np.argsort(-z[row], kind="stable")[:exact])
        assert np.isfinite(z[row, ids[exact:]]).all(), "drew an id that has no probability"
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(np.delete(dense[row], ids[:exact])).sum())
        # Below e^-87 of the largest a probability counts as none.
        if tail > -70:
            np.testing.assert_allclose(out.log_tail[row], min(tail, 0.0), atol=2e-5)


def test_chunks_hold_what_the_cache_does_or_what_reading_the_head_is_worth() -> None:
    assert rows_of_chunk(10_000, 8192, "cpu") == 256 and rows_of_chunk(3, 8192, "cpu") == 256
    for num_rows in (1, 5, 128, 130, 191, 192, 500, 4095):
        step = rows_of_chunk(num_rows, 262_144, "cpu")
        sizes = [min(step, num_rows - begin) for begin in range(0, num_rows, step)]
        assert sum(sizes) == num_rows and max(sizes) <= 192
        assert min(sizes) >= min(num_rows, 64), f"{sizes}: a chunk of a few rows reads the whole head for them"
    assert rows_of_chunk(0, 262_144, "cpu") == 1
    assert rows_of_chunk(10_000, 262_144, "cuda") == 256


@pytest.mark.parametrize("kind", ["hybrid", "topk", "threshold"])
def test_a_large_vocabulary_gives_the_same_bits_in_chunks_of_any_size(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, rows = 20_000, 150
    torch.manual_seed(0)
    weight_VD, hidden_MD = torch.randn(vocab, 16), torch.randn(rows, 16)
    head = Head(torch.ops.mkldnn._reorder_linear_weight(weight_VD, None), None, 1.0, None)
    keep = KeepConfig(kind=kind, k=4, num_draws=6)
    actual_M = torch.arange(rows)
    results = []
    for chunk in (8, 128):
        monkeypatch.setattr(reduce, "CHUNK_ROWS", chunk)
        with torch.inference_mode():
            logits = lambda a, b: head.logits(hidden_MD[a:b])  # noqa: E731
            results.append(reduce.reduce_chunks(logits, vocab, actual_M, keep, [(rows, 7)]))
    few, many = results
    for name in ("logprob", "rank", "log_tail", "entropy"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name))
    np.testing.assert_array_equal(few.kept.ids, many.kept.ids)
    np.testing.assert_array_equal(few.kept.logprobs, many.kept.logprobs)
    by_hand = torch.log_softmax(hidden_MD.double() @ weight_VD.double().T, -1)
    np.testing.assert_allclose(many.logprob, by_hand[actual_M, actual_M].numpy(), atol=1e-5)
