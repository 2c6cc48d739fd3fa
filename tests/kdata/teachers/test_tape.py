"""The tape: rows find their tokens through any shuffling of the engine's batch, and a wrong row is noticed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from kdata.errors import DistributionError, TeacherError
from kdata.format.keep import KeepConfig

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
VOCAB, KEEP = 200, KeepConfig(kind="hybrid", k=5, num_draws=7)
THRESHOLD = KeepConfig(kind="threshold", threshold=0.05)


def engine_run(seed: int, *, requests: int = 6, wrong: bool = False, keep: KeepConfig = KEEP) -> None:
    """A stand-in for the engine's loop: requests come, go and change places; of some rows nothing is drawn."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    from kdata.teachers.reduce import draws_of, reduce_logits
    from kdata.teachers.tape import Tape
    from kdata.teachers.vllm import TapeProcessor

    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, 4).astype(np.int32) for _ in range(requests)]
    lengths = rng.integers(1, 9, requests)
    logits = [torch.from_numpy(rng.standard_normal((length, VOCAB)).astype(np.float32) * 3) for length in lengths]
    outputs: list[list[int]] = [[] for _ in prompts]
    processor, batch, waiting = TapeProcessor(None, torch.device("cpu"), False), [], list(range(requests))
    with Tape(prompts, list(range(requests)), keep, 8) as tape:
        while batch or waiting:
            done = [place for place, request in enumerate(batch) if len(outputs[request]) == lengths[request]]
            added, moved = [], []
            places: dict[int, int] = {p: r for p, r in enumerate(batch) if p not in done}
            if waiting and (not places or rng.random() < 0.6):
                place, request = (done or [len(batch)])[0], waiting.pop()
                params = SamplingParams(extra_args=tape.mark(request))
                added.append((place, params, prompts[request].tolist(), outputs[request]))
                places[place] = request
            while places and max(places) >= len(places):  # the engine keeps its batch without holes
                hole, last = min(set(range(len(places))) - places.keys()), max(places)
                moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
                places[hole] = places.pop(last)
            if len(places) > 1 and rng.random() < 0.5:
                a, b = (int(x) for x in rng.choice(len(places), 2, replace=False))
                moved.append((a, b, MoveDirectionality.SWAP))
                places[a], places[b] = places[b], places[a]
            batch = [places[place] for place in range(len(places))]
            processor.update_state(BatchUpdate(len(batch), done, added, moved) if done or added or moved else None)
            if not batch:
                continue
            drawn = rng.random(len(batch)) < 0.7  # a prompt that is read in pieces has rows that nothing is drawn from
            rows = [
                logits[r][len(outputs[r])] if draws else torch.from_numpy(rng.standard_normal(VOCAB).astype(np.float32))
                for r, draws in zip(batch, drawn, strict=True)
            ]
            shown = torch.stack(rows)
            assert processor.apply(shown) is shown
            for request, draws in zip(batch, drawn, strict=True):
                if draws:
                    row = logits[request][len(outputs[request])]
                    outputs[request].append(int(row.argmax() if wrong else rng.integers(VOCAB)))
    for request, ids in enumerate(outputs):
        actual, whole = torch.tensor(ids), np.concatenate([prompts[request], np.array(ids, np.int32)])
        seeds = draws_of(whole, len(prompts[request]), keep, request)
        expected = reduce_logits(logits[request], actual, keep, seeds)
        logprob = expected.logprob - (1.0 if wrong else 0.0)
        taped = tape.reduced(request, np.array(ids, np.int32), logprob, expected.rank, 1e-3)
        for name in ("logprob", "rank", "log_tail", "entropy"):
            np.testing.assert_array_equal(getattr(taped, name), getattr(expected, name))
        for name in ("num_exact", "num_drawn", "ids", "logprobs"):
            np.testing.assert_array_equal(getattr(taped.kept, name), getattr(expected.kept, name))
        np.testing.assert_allclose(taped.kept.draw_logprobs, expected.kept.draw_logprobs, atol=1e-5)


BY_CONTEXT = [kept.model_copy(update={"draws_by": "context"}) for kept in (KEEP, THRESHOLD)]


@pytest.mark.parametrize("keep", [KEEP, THRESHOLD, *BY_CONTEXT], ids=lambda keep: f"{keep.kind}-{keep.draws_by}")
@pytest.mark.parametrize("seed", range(20))
def test_every_token_gets_the_row_that_it_was_drawn_from(seed: int, keep: KeepConfig) -> None:
    engine_run(seed, keep=keep)


@pytest.mark.parametrize("keep", [KEEP, THRESHOLD], ids=lambda keep: keep.kind)
def test_rows_of_other_tokens_are_refused(keep: KeepConfig) -> None:
    with pytest.raises(TeacherError, match="do not belong together"):
        engine_run(0, requests=12, wrong=True, keep=keep)


@pytest.mark.parametrize("keep", [KEEP, THRESHOLD], ids=lambda keep: keep.kind)
def test_a_likely_token_that_is_not_kept_is_refused(keep: KeepConfig) -> None:
    """The row says that the token is the last of all, the engine that it is the second and has a quarter."""
    from kdata.teachers.tape import Tape

    logits = torch.linspace(3, 0, VOCAB)[None]
    tape = Tape([np.array([1, 2], np.int32)], [0], keep, 3)
    tape.take(logits, [(0, [])])
    drawn, rank = np.array([VOCAB - 1], np.int32), np.full(1, 2, np.int32)
    with pytest.raises(TeacherError, match="a token that should be kept is not"):
        tape.reduced(0, drawn, np.log(np.array([0.25], np.float32)), rank, 1e-3)


@pytest.mark.parametrize("keep", BY_CONTEXT, ids=lambda keep: keep.kind)
def test_draws_of_another_context_are_refused(keep: KeepConfig) -> None:
    """An engine that shows a row before the token ahead of it is known, as asynchronous scheduling may."""
    from kdata.teachers.tape import Tape

    tape = Tape([np.array([1, 2], np.int32)], [0], keep, 3)
    tape.take(torch.zeros(1, VOCAB), [(0, [])])
    tape.take(torch.zeros(1, VOCAB), [(0, [-1])])
    with pytest.raises(TeacherError, match="before the tokens that they follow were known"):
        tape.reduced(0, np.array([3, 4], np.int32), np.zeros(2, np.float32), np.ones(2, np.int32), 1e-3)


def test_a_missing_row_is_refused() -> None:
    from kdata.teachers.tape import Tape

    tape = Tape([np.array([1, 2], np.int32)], [0], KEEP, 3)
    tape.take(torch.zeros(1, VOCAB), [(0, [])])
    with pytest.raises(TeacherError, match="did not show"):
        tape.reduced(0, np.array([3, 4], np.int32), np.zeros(2, np.float32), np.ones(2, np.int32), 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["topk", "hybrid", "adaptive", "threshold"])
def test_a_row_that_is_not_finite_spoils_its_own_request_only(kind: str, value: float) -> None:
    from kdata.teachers.reduce import draw_seed, reduce_logits
    from kdata.teachers.tape import Tape

    keep = KeepConfig(kind=kind, k=5, num_draws=7)
    prompts = [np.array([1, n], np.int32) for n in range(3)]
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, VOCAB)).astype(np.float32))
    rows[:, :, 7] = -torch.inf  # an id that is impossible
    actual = torch.tensor([[3, 4, 5], [6, 8, 9]])
    shown = rows.clone()
    shown[1, 1, 11] = value
    tape = Tape(prompts, [0, 1, 2], keep, 2)
    for t in range(2):
        tape.take(shown[t], [(request, actual[:t, request].tolist()) for request in range(3)])
    for request in range(3):
        seed = draw_seed(prompts[request], keep, request)
        expected = reduce_logits(rows[:, request], actual[:, request], keep, seed)
        arguments = (request, actual[:, request].numpy(), expected.logprob, expected.rank, 1e-3)
        if request == 1:
            with pytest.raises(DistributionError, match="hold NaN or infinity"):
                tape.reduced(*arguments)
        else:
            kept = tape.reduced(*arguments).kept
            np.testing.assert_array_equal(kept.ids, expected.kept.ids)
            np.testing.assert_allclose(kept.logprobs, expected.kept.logprobs, rtol=1e-6)


def test_the_last_row_of_a_token_counts_where_an_earlier_one_was_not_finite() -> None:
    from kdata.teachers.tape import Tape

    tape = Tape([np.array([1, 2], np.int32)], [0], KEEP, 3)
    tape.take(torch.full((1, VOCAB), torch.nan), [(0, [])])
    tape.take(torch.zeros(1, VOCAB), [(0, [])])
    logprob = np.full(1, -np.log(VOCAB), np.float32)
    assert tape.reduced(0, np.array([3], np.int32), logprob, np.ones(1, np.int32), 1e-3).rank.tolist() == [1]
