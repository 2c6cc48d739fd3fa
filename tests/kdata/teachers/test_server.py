"""A served vLLM: what is read from it, and all that can go wrong on the way; test_vllm_server.py has the real one."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.check.verify import verify
from kdata.config import parse_config
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError, DependencyError, KdataError, MismatchError, TeacherError, UnreachableError
from kdata.format.keep import KeepConfig
from kdata.jobs.reading import CaptureConfig, capture
from kdata.teachers import endpoints
from kdata.teachers.base import Readout
from kdata.teachers.config import SamplingConfig, ServerConfig, TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.server import ServedTeacher
from kdata.teachers.wire import is_distribution, rectangle
from tests.fakes import VOCAB, StandInTeacher, digests
from tests.served import Call, StandInServer

TOP = KeepConfig(kind="topk", k=5)
PREFIXES = [[7, 3, 250], [9, 8], [30, 31, 32, 33, 34, 35, 36], [5, 5, 5, 5], [299, 2, 7], [40, 41, 42, 43, 44]]
SEQUENCES = [np.array(ids, np.int32) for ids in PREFIXES]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the real ones, a hundred times faster."""
    monkeypatch.setattr(endpoints, "BACKOFF_SEC", 0.005)
    monkeypatch.setattr(endpoints, "HEARTBEAT_SEC", 0.05)


@pytest.fixture
def opened() -> Iterator[Callable[..., ServedTeacher]]:
    """Teachers that are closed at the end."""
    teachers: list[ServedTeacher] = []

    def load(model: Path, *servers: StandInServer | str, max_k: int = 5, **settings: Any) -> ServedTeacher:
        urls = [server if isinstance(server, str) else server.url for server in servers]
        config = ServerConfig(endpoints=urls, **{"patience_sec": 20, **settings})
        teachers.append(
            ServedTeacher(TeacherConfig(model=str(model), backend="vllm-server", server=config), max_k=max_k)
        )
        return teachers[-1]

    yield load
    for teacher in teachers:
        teacher.close()


Load = Callable[..., ServedTeacher]


def assert_equal(ours: Readout, theirs: Readout, atol: float = 2e-6) -> None:
    """The same at every position."""
    np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    np.testing.assert_array_equal(ours.rank, theirs.rank)
    np.testing.assert_array_equal(ours.kept.num_kept, theirs.kept.num_kept)
    np.testing.assert_array_equal(ours.kept.ids, theirs.kept.ids)
    for name in ("logprob", "log_tail"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=atol)
    np.testing.assert_allclose(ours.kept.logprobs, theirs.kept.logprobs, atol=atol)


def assert_read(teacher: ServedTeacher, sequences: list[np.ndarray] = SEQUENCES) -> None:
    """Every sequence read, once, in order, as the dense distribution says."""
    for ids, readout in zip(sequences, teacher.read(sequences, TOP), strict=True):
        assert_equal(readout, StandInTeacher().readout(ids, TOP))


def until(come: Callable[[], Any], sec: float = 20) -> Any:
    """What `come` returns, once it is something."""
    for _ in range(int(sec / 0.005)):
        if value := come():
            return value
        time.sleep(0.005)
    raise AssertionError("it never came")


# ------------------------------------------------------------------------------------------------ what is returned


@pytest.mark.parametrize("generates", [True, False])
@pytest.mark.parametrize("keep", [TOP, KeepConfig(kind="adaptive", k=5, mass=0.6, min_k=2)])
def test_it_reads_and_writes_the_dense_distribution(
    llama_dir: Path, opened: Load, generates: bool, keep: KeepConfig
) -> None:
    oracle = StandInTeacher(context=128)
    with StandInServer(llama_dir, generates=generates) as server:
        teacher = opened(llama_dir, server)
        assert (teacher.context, teacher.vocab_size) == (128 if generates else 127, VOCAB)
        for ids, readout in zip(SEQUENCES, teacher.read(SEQUENCES, keep), strict=True):
            dense_TV = oracle.dense(ids)
            own_T = np.take_along_axis(dense_TV[1:], ids[1:, None], 1)[:, 0]
            np.testing.assert_allclose(readout.logprob[1:], own_T, atol=2e-6)
            assert_equal(readout, oracle.readout(ids, keep))
        for sampling in (SamplingConfig(max_tokens=12), SamplingConfig(max_tokens=4, min_tokens=4, temperature=0)):
            written = teacher.write(SEQUENCES, keep, sampling, range(len(SEQUENCES)))
            for ours, theirs in zip(written, oracle.write(SEQUENCES, keep, sampling, range(6)), strict=True):
                assert (ours.num_prompt_tokens, ours.finish_reason) == (theirs.num_prompt_tokens, theirs.finish_reason)
                assert_equal(ours.readout, theirs.readout)
        paths = {call.path for call in server.calls}
        assert paths == {"/inference/v1/generate" if generates else "/v1/completions"}


def test_a_sequence_as_long_as_the_server_s_length_is_read_whole(llama_dir: Path, opened: Load) -> None:
    """vLLM refuses a prompt that leaves no place for a token, so the last token of the sequence is the one it writes."""
    rng = np.random.default_rng(3)
    sequences = [rng.integers(2, VOCAB, size).astype(np.int32) for size in (127, 128, 2)]
    with StandInServer(llama_dir) as server:
        teacher = opened(llama_dir, server)
        assert teacher.context == 128
        for ids, readout in zip(sequences, teacher.read(sequences, TOP), strict=True):
            assert_equal(readout, StandInTeacher().readout(ids, TOP))
        [written] = teacher.write([sequences[0]], TOP, SamplingConfig(max_tokens=9), [0])
        assert len(written.readout.token_ids) == 128 and written.finish_reason == "length"


@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.integers(1, 6),
    k=st.integers(1, 9),
    extra=st.booleans(),
    top=st.booleans(),
)
def test_lists_of_a_server_become_the_dense_top_k(seed: int, positions: int, k: int, extra: bool, top: bool) -> None:
    rng = np.random.default_rng(seed)
    dense_TV = np.log(rng.dirichlet(np.full(12, 0.4), positions) + 1e-12)
    order_TV = np.argsort(-dense_TV, 1)
    own_T = order_TV[:, 0] if top else rng.integers(0, 12, positions)
    ids, counts, ranks = [], [], []
    for t in range(positions):
        others = [v for v in order_TV[t, : k + extra] if v != own_T[t]]
        ids += [own_T[t], *others]
        counts.append(1 + len(others))
        ranks.append(int(np.flatnonzero(order_TV[t] == own_T[t])[0]) + 1)
    logprobs_N = dense_TV[np.repeat(np.arange(positions), counts), ids].astype(np.float32)
    arrays = (np.array(ids), logprobs_N, np.array(counts), np.array(ranks))
    top_k = rectangle(*arrays, own_T, k, 12)
    np.testing.assert_array_equal(top_k.ids, order_TV[:, :k])
    np.testing.assert_array_equal(top_k.logprobs, np.take_along_axis(dense_TV, order_TV[:, :k], 1).astype(np.float32))
    np.testing.assert_array_equal(top_k.logprob, dense_TV[np.arange(positions), own_T].astype(np.float32))
    np.testing.assert_array_equal(top_k.rank, ranks)
    with pytest.raises(TeacherError, match="other tokens"):
        rectangle(*arrays, (own_T + 1) % 12, k, 12)
    with pytest.raises(TeacherError, match="outside of the vocabulary"):
        rectangle(*arrays, own_T, k, max(ids))
    assert is_distribution(top_k.logprobs, 12) and not is_distribution(top_k.logprobs + 4, 12)
    assert k == 12 or not is_distribution(top_k.logprobs - 4, 12)


def test_the_server_s_number_for_minus_infinity_is_decoded() -> None:
    arrays = (np.array([3, 0]), np.array([-9999.0, 0.0], np.float32), np.array([2]), np.array([7]))
    top_k = rectangle(*arrays, np.array([3]), 1, 8)
    assert top_k.logprob[0] == -np.inf and top_k.logprobs.tolist() == [[0.0]]


# ------------------------------------------------------------------------------------------------------- what passes

PASSING: dict[str, Callable[[Call], object]] = {
    "too many": lambda call: call.status(429, Retry_After="0"),
    "bad gateway": lambda call: call.status(502),
    "unavailable": lambda call: call.status(503),
    "gateway timeout": lambda call: call.status(504),
    "reset": Call.reset,
    "truncated": lambda call: call.raw(b'{"choices": [', length=400),
    "silent": Call.hang,
    "aborted": lambda call: call.change(lambda answer: answer["choices"][0].update(finish_reason="abort")),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_request_lost_to_a_passing_error_is_sent_again(
    llama_dir: Path, opened: Load, fault: Callable[[Call], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the first requests every second one fails, then all are answered."""

    def sometimes(call: Call) -> bool:
        bad = call.number < 8 and call.number % 2 == 0
        if bad:
            fault(call)
        return bad

    with StandInServer(llama_dir, fault=sometimes) as server:
        teacher = opened(llama_dir, server, timeout_sec=1.0, max_concurrency=2, retries=50)
        assert_read(teacher)
        assert len(server.calls) > len(SEQUENCES)
        assert "gets no request until it is inspected" in caplog.text and "ready again" in caplog.text


def test_many_503_in_a_row_are_waited_out(llama_dir: Path, opened: Load) -> None:
    """Sixty answers of 503 are no fault of a request, however few retries it has."""

    def storm(call: Call) -> bool:
        if call.number < 60:
            call.status(503)
        return call.number < 60

    with StandInServer(llama_dir, fault=storm) as server:
        assert_read(opened(llama_dir, server, retries=0, max_concurrency=6))
        assert len(server.calls) == 60 + len(SEQUENCES)


def test_a_request_that_is_always_lost_is_given_up_while_others_are_answered(llama_dir: Path, opened: Load) -> None:
    def poison(call: Call) -> bool:
        if call.ids == PREFIXES[2]:
            call.reset()
        return call.ids == PREFIXES[2]

    with StandInServer(llama_dir, fault=poison) as server:
        teacher = opened(llama_dir, server, retries=3)
        with pytest.raises(TeacherError, match=r"lost 4 times \(server.retries=3\)"):
            teacher.read(SEQUENCES, TOP)
        assert sum(call.ids == PREFIXES[2] for call in server.calls) == 4
        assert_read(teacher, [*SEQUENCES[:2], *SEQUENCES[3:]])


def test_after_a_500_the_server_s_health_decides_whether_the_request_is_at_fault(
    llama_dir: Path, opened: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "HEARTBEAT_SEC", 1000)  # which would find it too

    def engine_dies(call: Call) -> bool:
        if call.number == 0:
            server.health = 503
            threading.Timer(0.2, lambda: setattr(server, "health", 200)).start()
            call.status(500, "EngineCore encountered an issue")
        return call.number == 0

    with StandInServer(llama_dir, fault=engine_dies) as server:
        assert_read(opened(llama_dir, server))

    def own_fault(call: Call) -> bool:
        call.status(500, "list index out of range")
        return True

    with StandInServer(llama_dir, fault=own_fault) as server:
        with pytest.raises(TeacherError, match="HTTP 500: list index out of range"):
            opened(llama_dir, server).read(SEQUENCES[:1], TOP)
        assert len(server.calls) == 1


# --------------------------------------------------------------------------------------------- what is never retried


def _prompt_row(answer: dict[str, Any], t: int) -> dict[str, Any]:
    return answer["prompt_logprobs"][t]


def _wrong_token(answer: dict[str, Any]) -> None:
    row = _prompt_row(answer, 1)
    first, *others = row.items()
    answer["prompt_logprobs"][1] = dict([("17" if first[0] != "17" else "18", first[1]), *others])


def _swap(answer: dict[str, Any]) -> None:
    row = _prompt_row(answer, 2)
    keys = list(row)
    row[keys[-1]]["logprob"], row[keys[-2]]["logprob"] = row[keys[-2]]["logprob"], row[keys[-1]]["logprob"]


def _foreign_id(answer: dict[str, Any]) -> None:
    row = _prompt_row(answer, 1)
    row["300"] = row.pop(list(row)[-1])


def _raise_all(answer: dict[str, Any]) -> None:
    for entry in _prompt_row(answer, 1).values():
        entry["logprob"] += 3.0


WRONG: dict[str, tuple[Callable[[Call], object], str]] = {
    "refused": (lambda call: call.status(400, "this prompt is not to my taste"), "HTTP 400: this prompt is not to my"),
    "too large": (lambda call: call.status(413), "HTTP 413"),
    "redirected": (lambda call: call.status(307, Location="http://127.0.0.1:9/"), "HTTP 307"),
    "garbage": (lambda call: call.raw(b"<html>It works!</html>"), "not what vLLM sends"),
    "binary": (lambda call: call.raw(b"\xff\xfe\x00"), "not what vLLM sends"),
    "cut JSON": (lambda call: call.raw(b'{"choices": [{"token_ids"'), "not what vLLM sends"),
    "another form": (lambda call: call.raw(b'{"choices": [{"token_ids": "text"}]}'), "not what vLLM sends"),
    "no HTTP": (lambda call: call.handler.connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n"), "the answer is no HTTP"),
    "two choices": (lambda call: call.change(lambda a: a["choices"].append(a["choices"][0])), "2 completions"),
    "another prompt": (lambda call: call.change(lambda a: a["prompt_token_ids"].reverse()), "about other tokens"),
    "another token": (lambda call: call.change(_wrong_token), "of other tokens"),
    "a position less": (lambda call: call.change(lambda a: a["prompt_logprobs"].pop()), "of 1 positions for 2"),
    "no position": (lambda call: call.change(lambda a: a.update(prompt_logprobs=None)), "of 0 positions for 2"),
    "an entry less": (lambda call: call.change(lambda a: _prompt_row(a, 1).popitem()), "fewer than the 5"),
    "a foreign id": (lambda call: call.change(_foreign_id), "outside of the vocabulary"),
    "another order": (lambda call: call.change(_swap), "do not fall"),
    "more than 1": (lambda call: call.change(_raise_all), "sum to more than 1"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_an_error_at_once(
    llama_dir: Path, opened: Load, fault: Callable[[Call], object], message: str
) -> None:
    def always(call: Call) -> bool:
        fault(call)
        return True

    with StandInServer(llama_dir, fault=always) as server:
        teacher = opened(llama_dir, server)
        with pytest.raises(TeacherError, match=message):
            teacher.read(SEQUENCES[:1], TOP)
        assert len(server.calls) == 1
        server.fault = lambda call: None
        assert_read(teacher)


@pytest.mark.parametrize(("key", "value"), [("top_logprobs", []), ("token_id", 17), ("rank", None)])
def test_log_probabilities_of_written_tokens_are_checked_too(
    llama_dir: Path, opened: Load, key: str, value: Any
) -> None:
    def spoil(answer: dict[str, Any]) -> None:
        row = answer["choices"][0]["logprobs"]["content"][1]
        (row["top_logprobs"][0] if key == "token_id" else row)[key] = value

    def always(call: Call) -> bool:
        call.change(spoil)
        return True

    refusal = pytest.raises(TeacherError, match=r"did not return 6 log-probabilities|other tokens|fewer than the 5")
    with StandInServer(llama_dir, fault=always) as server, refusal:
        opened(llama_dir, server).write(SEQUENCES[:1], TOP, SamplingConfig(max_tokens=3, min_tokens=3), [0])


# ---------------------------------------------------------------------------------------------------- several, and none


def test_the_endpoint_with_the_fewest_requests_under_way_gets_the_next(llama_dir: Path, opened: Load) -> None:
    with StandInServer(llama_dir) as one, StandInServer(llama_dir) as two:
        for server in (one, two):  # nobody is answered before all have come
            server.fault = lambda call: until(lambda: len(one.calls) + len(two.calls) == len(SEQUENCES)) and None
        assert_read(opened(llama_dir, one, two))
        assert len(one.calls) == len(two.calls) == len(SEQUENCES) / 2


def test_requests_are_spread_within_the_limit_of_each_endpoint(llama_dir: Path, opened: Load) -> None:
    sequences = [np.array([n, n + 1, 7], np.int32) for n in range(120)]
    with StandInServer(llama_dir) as one, StandInServer(llama_dir) as two:
        for server in (one, two):
            server.fault = lambda call: until(lambda: call.handler.served.most_running >= 3) and time.sleep(0.005)
        teacher = opened(llama_dir, one, two, max_concurrency=3)
        assert_read(teacher, sequences)
        assert (one.most_running, two.most_running) == (3, 3)
        assert len(one.calls) + len(two.calls) == 120
        before = len(one.calls), len(two.calls)
        two.fault = lambda call: (
            until(lambda: len(one.calls) >= before[0] + 100) and None
        )  # busy: the other gets the rest
        assert_read(teacher, sequences)
        assert len(one.calls) + len(two.calls) == 240 and len(two.calls) <= before[1] + 20


@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_a_dead_endpoint_is_ignored_while_another_lives(llama_dir: Path, opened: Load, when: str) -> None:
    with StandInServer(llama_dir) as dying, StandInServer(llama_dir) as other:
        if when == "from the start":
            dying.kill()
        else:
            dying.fault = lambda call: dying.kill() if call.number == 2 else None
        teacher = opened(llama_dir, dying, other, patience_sec=0.3)
        for _ in range(4):
            assert_read(teacher)
            time.sleep(0.15)  # longer in all than the patience with a run in which nobody answers


def test_an_interrupt_ends_the_wait_and_the_teacher_still_works(
    llama_dir: Path, opened: Load, interruptible: None
) -> None:
    def wait(call: Call) -> bool:
        if call.number == len(SEQUENCES) - 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        call.hang()
        return True

    with StandInServer(llama_dir, fault=wait) as server:
        teacher = opened(llama_dir, server)
        with pytest.raises(KeyboardInterrupt):
            teacher.read(SEQUENCES, TOP)
        server.fault = lambda call: None
        assert_read(teacher)


def test_the_run_ends_when_no_endpoint_answers_for_patience_sec(llama_dir: Path, opened: Load) -> None:
    with StandInServer(llama_dir) as one, StandInServer(llama_dir) as two:
        teacher = opened(llama_dir, one, two, patience_sec=0.3)
        for server in (one, two):
            server.fault = lambda call: call.handler.served.kill()
        with pytest.raises(UnreachableError, match=r"no endpoint has answered .*patience_sec=0.3") as caught:
            teacher.read(SEQUENCES, TOP)
        assert one.url in str(caught.value) and two.url in str(caught.value) and "no connection" in str(caught.value)
        assert not isinstance(caught.value, TeacherError)  # no row is at fault, so none is set aside
        with pytest.raises(UnreachableError):
            opened(llama_dir, one, patience_sec=0.1)


def test_a_server_that_shuts_down_with_open_connections_is_abandoned(
    llama_dir: Path, opened: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """As vLLM does on SIGTERM. Without the look at its health the requests would wait for `timeout_sec`, 1000 here."""
    with StandInServer(llama_dir) as server:
        teacher = opened(llama_dir, server, timeout_sec=1000)

        def shut(call: Call) -> bool:
            if call.number == len(SEQUENCES) - 1:  # all are under way: nobody else finds the port closed
                threading.Thread(target=server.close_port).start()
            call.hang()
            return True

        server.fault = shut
        again: list[StandInServer] = []

        def start_again() -> None:
            until(lambda: "it is shutting down" in caplog.text)
            again.append(StandInServer(llama_dir, port=server.port))

        thread = threading.Thread(target=start_again)
        thread.start()
        assert_read(teacher)
        thread.join()
        assert not server.stopped.is_set() and len(again[0].calls) == len(SEQUENCES)
        again[0].kill()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "else"}, r"model: 'stand-in' -> 'else'|model: 'else' -> 'stand-in'"),
        ({"version": "9"}, "vLLM: "),
        ({"max_model_len": 99}, "--max-model-len: "),
        ({"generates": False}, "--enable-scale-out: "),
        ({"teacher": StandInTeacher("other", context=128)}, "believes otherwise"),
    ],
)
def test_endpoints_that_disagree_are_refused(
    llama_dir: Path, opened: Load, other: dict[str, Any], message: str
) -> None:
    refusal = pytest.raises(MismatchError, match=message)
    with StandInServer(llama_dir) as one, StandInServer(llama_dir, **other) as two, refusal:
        opened(llama_dir, one, two)


def test_a_server_that_comes_back_as_another_model_is_refused(
    llama_dir: Path, opened: Load, caplog: pytest.LogCaptureFixture
) -> None:
    def replaced(call: Call) -> None:
        server.teacher = StandInTeacher("other", context=128)
        call.reset()

    with StandInServer(llama_dir) as server, StandInServer(llama_dir) as other:
        server.fault = lambda call: replaced(call) or True
        assert_read(opened(llama_dir, server, other))  # the other one does all
        until(lambda: "is not used any more" in caplog.text)
        assert "believes otherwise" in caplog.text
    with StandInServer(llama_dir) as server:
        server.fault = lambda call: replaced(call) or True
        teacher = opened(llama_dir, server)
        for _ in range(2):
            with pytest.raises(MismatchError, match="believes otherwise"):
                teacher.read(SEQUENCES, TOP)


# ------------------------------------------------------------------------------------------------- who the server is


@pytest.mark.parametrize(
    ("server", "settings", "error", "message"),
    [
        ({"max_logprobs": 4}, {}, ConfigError, r"start the server with --max-logprobs 5"),
        ({"logprobs_mode": "processed_logprobs"}, {}, ConfigError, "not the raw ones; start it with --logprobs-mode raw"),
        ({"logprobs_mode": "raw_logits"}, {}, ConfigError, "not the raw ones"),
        ({}, {"name": "nobody"}, ConfigError, r"serves \['adapter', 'stand-in'\], not server.name='nob"),
        ({"token": "sesame"}, {}, ConfigError, r"HTTP 401.*server.auth_env names"),
        ({}, {"auth_env": "KDATA_TEST_NOT_SET"}, ConfigError, "KDATA_TEST_NOT_SET, which is not set"),
    ],
)  # fmt: skip
def test_an_unsuitable_server_is_refused_with_a_remedy(
    llama_dir: Path, opened: Load, server: dict, settings: dict, error: type[KdataError], message: str
) -> None:
    with StandInServer(llama_dir, **server) as served, pytest.raises(error, match=message):
        opened(llama_dir, served, **settings)


@pytest.mark.parametrize(("name", "asked"), [(None, "stand-in"), ("adapter", "adapter")])
def test_the_base_model_is_asked_unless_another_is_named(
    llama_dir: Path, opened: Load, name: str | None, asked: str
) -> None:
    with StandInServer(llama_dir) as server:
        teacher = opened(llama_dir, server, name=name)
        assert_read(teacher)
        assert teacher.context == 128 and {call.body["model"] for call in server.calls} == {asked}


def test_writing_needs_one_log_probability_more_and_says_so(llama_dir: Path, opened: Load) -> None:
    with StandInServer(llama_dir, max_logprobs=5) as server:
        teacher = opened(llama_dir, server)
        assert_read(teacher)
        with pytest.raises(ConfigError, match=r"--max-logprobs 6"):
            teacher.write(SEQUENCES, TOP, SamplingConfig(max_tokens=2), range(6))


def test_another_tokenizer_is_refused(llama_dir: Path, tmp_path: Path, opened: Load) -> None:
    from tests.fakes import save_tokenizer

    shutil.copytree(llama_dir, tmp_path / "m")
    save_tokenizer(tmp_path / "m", lines=["other words make other merges", "return x"] * 3)
    with StandInServer(llama_dir) as server, pytest.raises(MismatchError, match="into other token ids"):
        opened(tmp_path / "m", server)


def test_a_context_longer_than_the_server_s_is_refused(llama_dir: Path) -> None:
    with StandInServer(llama_dir, max_model_len=100) as server:
        config = {"model": str(llama_dir), "backend": "vllm-server", "server": {"endpoints": [server.url]}}
        with pytest.raises(ConfigError, match="context=101 exceeds the server's --max-model-len 100"):
            load_teacher(TeacherConfig(**config, context=101), max_k=5)
        teacher = load_teacher(TeacherConfig(**config, context=50), max_k=5)
        assert teacher.context == 50
        teacher.close()


def test_the_dataset_names_the_teacher_but_not_its_address(llama_dir: Path, tmp_path: Path, opened: Load) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in llama_dir.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, bare)
    with StandInServer(llama_dir) as server:
        info = opened(llama_dir, server).info
        assert (info.model, info.backend, info.backend_version) == (llama_dir.name, "vllm-server", "0.0.1")
        assert info.weights_hash is not None and info.revision is None and not info.deterministic
        without = opened(bare, server).info
        assert without.model_dump() == {**info.model_dump(), "model": "bare", "weights_hash": None}


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"endpoints": []}, "at least 1 item"),
        ({"endpoints": ["127.0.0.1:8000"]}, "is no URL of a server; write http://HOST:PORT"),
        ({"endpoints": ["ftp://host"]}, "is no URL"),
        ({"endpoints": ["http://host/v1?a=1"]}, "is no URL"),
        ({"endpoints": ["http://host/v1?key=1"]}, "looks like a password or a token"),
        ({"endpoints": ["http://host:1", "http://host:1/v1/"]}, "named twice"),
        ({"endpoints": ["https://user:hush@host"]}, "looks like a password or a token"),
        ({"endpoints": ["https://user@host"]}, "use server.auth_env"),
        (None, r"needs server.endpoints: --set 'teacher.server.endpoints=\[http"),
    ],
)
def test_a_wrong_setting_is_named(server: dict | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(TeacherConfig, {"model": "m", "backend": "vllm-server", "server": server}, "teacher settings")
    assert "hush" not in str(caught.value)


def test_a_server_for_another_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="ignored by backend vllm; use vllm-server"):
        parse_config(TeacherConfig, {"model": "m", "server": {"endpoints": ["http://h:1"]}}, "teacher settings")


def test_the_settings_of_a_run_do_not_contain_the_address() -> None:
    from kdata.pipelines.recipe import load_recipe

    chosen = ["teacher.backend=vllm-server", "teacher.server.endpoints=[http://host:1]"]
    recipe = load_recipe(Path("quickstart"), chosen)
    assert recipe.teacher.server is not None and recipe.settings()["teacher"]["backend"] == "vllm-server"
    assert "host:1" not in json.dumps(recipe.settings())


def test_without_the_http_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, llama_dir: Path) -> None:
    for name in ("kdata.teachers.server", "kdata.teachers.endpoints"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    config = TeacherConfig(model=str(llama_dir), backend="vllm-server", server=ServerConfig(endpoints=["http://h:1"]))
    with pytest.raises(DependencyError, match=r"'kdata\[server\]'"):
        load_teacher(config, max_k=5)


# ----------------------------------------------------------------------------------------------------------- captures


def captured(root: Path, model: Path, corpus: Path, url: str, *, auth_env: str | None = None, **settings: Any) -> Path:
    """A capture as `kdata capture --backend vllm-server` does it; k = 8 and units of 120 tokens unless said otherwise."""
    server = ServerConfig(endpoints=[url], auth_env=auth_env)
    teacher = TeacherConfig(model=str(model), backend="vllm-server", server=server)
    fields = {"k": 8, "kind": "topk", "unit_tokens": 120, **settings}
    return capture(root, CaptureConfig(corpus=CorpusConfig(path=str(corpus)), **fields), teacher).path


@pytest.mark.parametrize("kind", ["hybrid", "sampled"])
def test_a_kind_that_needs_the_full_distribution_is_refused_before_anything_is_written(
    llama_dir: Path, tmp_path: Path, corpus_file: Path, kind: str
) -> None:
    with StandInServer(llama_dir) as server:
        with pytest.raises(ConfigError, match=r"returns the top k only.*kind=topk or adaptive"):
            captured(tmp_path / "d", llama_dir, corpus_file, server.url, kind=kind)
        with pytest.raises(ConfigError, match="top k only"):
            captured(tmp_path / "d", llama_dir, corpus_file, server.url, temperatures=[2.0])
    assert not (tmp_path / "d").exists()


def test_another_host_resumes_to_the_same_bytes(llama_dir: Path, tmp_path: Path, corpus_file: Path) -> None:
    with StandInServer(llama_dir) as server:
        whole = captured(tmp_path / "whole", llama_dir, corpus_file, server.url)
    with StandInServer(llama_dir) as server:
        server.fault = lambda call: call.number >= 11 and call.status(401, "the token has expired") is None
        with pytest.raises(ConfigError, match="token has expired"):
            captured(tmp_path / "parts", llama_dir, corpus_file, server.url)
        assert 0 < len(kdata.open(tmp_path / "parts").manifest) < len(kdata.open(whole).manifest)
    with StandInServer(llama_dir) as server:
        parts = captured(tmp_path / "parts", llama_dir, corpus_file, server.url)
    assert verify(kdata.open(parts), deep=True) == []
    assert digests(parts) == digests(whole)


def test_the_token_is_sent_and_never_shown_nor_written(
    llama_dir: Path, tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    secret = "sesame-4711-open"
    monkeypatch.setenv("KDATA_TEST_TOKEN", f" {secret}\n")
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    with StandInServer(llama_dir, token=secret) as server:
        server.fault = lambda call: call.number == 3 and call.status(503, f"{secret} is busy") is None
        captured(tmp_path / "d", llama_dir, corpus_file, server.url, auth_env="KDATA_TEST_TOKEN")
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
        config = ServerConfig(endpoints=[server.url], auth_env="KDATA_TEST_TOKEN", retries=0, patience_sec=0.2)
        teacher = ServedTeacher(TeacherConfig(model=str(llama_dir), backend="vllm-server", server=config), max_k=5)
        shown += [repr(config), config.model_dump_json(), repr(teacher), str(teacher.info)]
        faults = [
            lambda call: call.status(400, f"your token {secret} is bad"),
            lambda call: call.reset(),
            lambda call: call.handler.connection.sendall(b"garbage\r\n\r\n"),
            lambda call: server.kill(),
        ]
        for fault in faults:
            server.fault = lambda call, fault=fault: fault(call) is None
            with pytest.raises(KdataError) as caught:
                teacher.read(SEQUENCES[:1], TOP)
            error: BaseException | None = caught.value
            while error is not None:
                shown += [str(error), repr(error), repr(vars(error))]
                error = error.__cause__ or error.__context__
        teacher.close()
    shown += [caplog.text, *capfd.readouterr()]
    assert any("your token *** is bad" in text for text in shown)
    assert not any(secret in text for text in shown)
    for path in (tmp_path / "d").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content and b"127.0.0.1" not in content, path
