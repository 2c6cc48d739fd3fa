"""A stand-in for a vLLM server: real HTTP on the loopback, answers computed from a `StandInTeacher`, faults on demand.

It knows both ways into vLLM 0.32 that kdata uses, in the form that was recorded from the real one; test_vllm_server.py
holds the real one and the teacher together.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np

from kdata.format.keep import KeepConfig
from kdata.teachers.config import SamplingConfig
from kdata.teachers.model import load_tokenizer
from kdata.teachers.server import PROBE_TEXT
from tests.fakes import StandInTeacher
from tests.web import Quiet


class Call:
    """One request for work; `number` counts those that were not probes, from 0. A fault may answer it."""

    def __init__(self, handler: Handler, path: str, body: dict[str, Any], number: int) -> None:
        self.handler, self.path, self.body, self.number = handler, path, body, number
        self.ids: list[int] = body.get("token_ids") or body["prompt"]

    def status(self, code: int, message: str = "told to", **headers: str) -> None:
        """Answer with an error, as vLLM words it."""
        self.handler.answer(code, {"error": {"message": message, "type": "X", "code": code}}, **headers)

    def raw(self, content: bytes, length: int | None = None) -> None:
        """Answer 200 with these bytes, announced as `length`."""
        self.handler.send(200, content, length)

    def reset(self) -> None:
        """Reset the connection."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.connection.close()
        self.handler.close_connection = True

    def hang(self) -> None:
        """Never answer, until the server is stopped."""
        self.handler.served.stopped.wait()
        self.handler.close_connection = True

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Answer well, but for a change."""
        answer = self.handler.served.complete(self.path, self.body)
        change(answer)
        self.handler.answer(200, answer)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    served: StandInServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def send(self, code: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        if length is not None:
            self.close_connection = True

    def answer(self, code: int, value: Any, **headers: str) -> None:
        self.send(code, json.dumps(value).encode(), **headers)

    def do_GET(self) -> None:
        served = self.served
        if self.path == "/health":
            self.send(served.health, b"")
        elif self._allowed():
            adapter = {"id": "adapter", "parent": served.name, "max_model_len": None}
            model = {"id": served.name, "parent": None, "max_model_len": served.max_model_len}
            answers = {"/v1/models": {"data": [adapter, model]}, "/version": {"version": served.version}}
            known = self.path in answers
            self.answer(200 if known else 404, answers.get(self.path, {"detail": "Not Found"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.headers.append(dict(self.headers))
        if self._allowed():
            self.served.work(self, body)

    def _allowed(self) -> bool:
        token = self.served.token
        if token is None or self.headers.get("Authorization") == f"Bearer {token}":
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False


class StandInServer:
    """A server on a port of its own, or on the one given.

    Args:
        model: folder with the tokenizer.
        fault: gets every request for work and may answer it: then it returns True.
    """

    def __init__(
        self,
        model: Path,
        *,
        teacher: StandInTeacher | None = None,
        fault: Callable[[Call], bool | None] = lambda call: None,
        generates: bool = True,
        token: str | None = None,
        name: str = "stand-in",
        version: str = "0.0.1",
        max_model_len: int = 128,
        max_logprobs: int = 20,
        logprobs_mode: str = "raw_logprobs",
        port: int = 0,
    ) -> None:
        self.teacher, self.fault, self.generates, self.token = (
            teacher or StandInTeacher(context=128),
            fault,
            generates,
            token,
        )
        self.name, self.version, self.max_model_len = name, version, max_model_len
        self.max_logprobs, self.logprobs_mode, self.health = max_logprobs, logprobs_mode, 200
        self._tokenizer = load_tokenizer(model)
        self._probe = self._tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        self.calls: list[Call] = []
        self.headers: list[dict[str, str]] = []
        self.stopped, self._lock = threading.Event(), threading.Lock()
        self.running, self.most_running = 0, 0
        self._connections: list[socket.socket] = []
        self._start(port)

    def _start(self, port: int) -> None:
        served = self

        class Bound(Handler):
            served = self

            def setup(self) -> None:
                super().setup()
                served._connections.append(self.connection)

        self._http = Quiet(("127.0.0.1", port), Bound)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close_port(self) -> None:
        """What vLLM does first on SIGTERM: no new connection; those that are open stay open, and silent."""
        self._http.shutdown()
        self._http.server_close()

    def kill(self) -> None:
        """As SIGKILL does it: port and connections are gone."""
        self.close_port()
        self.stopped.set()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed before

    def __enter__(self) -> StandInServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    # ----------------------------------------------------------------------------------------------------------- work

    def work(self, handler: Handler, body: dict[str, Any]) -> None:
        """Answer a request for a completion."""
        path = handler.path
        if path == "/inference/v1/generate" and not self.generates:
            return handler.answer(403, {"error": {"message": "Scale-out endpoints are disabled."}})
        if isinstance(body.get("prompt"), str):
            ids = self._tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            choice = {"token_ids": [0], "finish_reason": "length", "prompt_token_ids": ids}
            return handler.answer(200, {"choices": [choice]})
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            call = Call(handler, path, body, len(self.calls))
            probe = call.ids[: len(self._probe)] == self._probe
            if not probe:
                self.calls.append(call)
        try:
            if probe or not self.fault(call):
                asked = body.get("sampling_params", body)
                wanted = max(asked.get("logprobs") or 0, asked.get("prompt_logprobs") or 0)
                if wanted > self.max_logprobs:
                    call.status(400, f"Requested logprobs of {wanted}, greater than max allowed: {self.max_logprobs}")
                else:
                    handler.answer(200, self.complete(path, body))
        finally:
            with self._lock:
                self.running -= 1

    def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The good answer."""
        generate = path == "/inference/v1/generate"
        asked, ids = (body["sampling_params"], body["token_ids"]) if generate else (body, body["prompt"])
        assert len(ids) < self.max_model_len, "vLLM refuses a prompt that leaves no place for a token"
        whole, finish = self._write(ids, asked)
        new, logprobs = whole[len(ids) :], None
        if asked.get("logprobs") is not None:
            mode_temperature = asked["temperature"] if self.logprobs_mode == "processed_logprobs" else 1.0
            rows = [self._row(whole[:t], mode_temperature) for t in range(len(ids), len(whole))]
            content = [_content(row, token, asked["logprobs"]) for row, token in zip(rows, new, strict=True)]
            logprobs = {"content": content} if generate else {"token_logprobs": [c["logprob"] for c in content]}
        prompt = {"prompt_token_ids": ids, "prompt_logprobs": None}
        if asked.get("prompt_logprobs"):
            rows = [self._row(ids[:t]) for t in range(1, len(ids))]
            ranked = [_entries(row, token, asked["prompt_logprobs"]) for row, token in zip(rows, ids[1:], strict=True)]
            prompt["prompt_logprobs"] = [None, *ranked]
        choice = {"index": 0, "token_ids": new, "finish_reason": finish, "logprobs": logprobs}
        return {"choices": [choice], **prompt} if generate else {"choices": [{**choice, **prompt}]}

    def _row(self, prefix: list[int], temperature: float = 1.0) -> np.ndarray:
        row = self.teacher.after(prefix)
        if self.logprobs_mode == "raw_logits":
            return (row + 9.0).astype(np.float32)
        scaled = row / temperature
        return (scaled - np.log(np.exp(scaled).sum())).astype(np.float32)

    def _write(self, ids: list[int], asked: dict[str, Any]) -> tuple[list[int], str]:
        if "allowed_token_ids" in asked:
            [only] = asked["allowed_token_ids"]
            return [*ids, only], "length"
        sampling = SamplingConfig(
            max_tokens=asked["max_tokens"],
            min_tokens=asked["max_tokens"] if asked.get("ignore_eos") else asked["min_tokens"],
            temperature=asked["temperature"],
        )
        keep = KeepConfig(kind="topk", k=1)
        [done] = self.teacher.write([np.array(ids, np.int32)], keep, sampling, [asked.get("seed", 0)])
        return done.readout.token_ids.tolist(), done.finish_reason


def _ranked(row: np.ndarray, token: int, k: int) -> list[tuple[int, float, int]]:
    """(id, logprob, rank) of the token itself, then of the k most probable, without it."""
    order = np.argsort(-row, kind="stable")
    rank = int(np.flatnonzero(order == token)[0]) + 1
    top = [(int(v), float(row[v]), place + 1) for place, v in enumerate(order[:k]) if v != token]
    return [(int(token), float(row[token]), rank), *top]


def _entries(row: np.ndarray, token: int, k: int) -> dict[str, Any]:
    """A position of prompt_logprobs."""
    return {str(v): {"logprob": p, "rank": r, "decoded_token": "same"} for v, p, r in _ranked(row, token, k)}


def _content(row: np.ndarray, token: int, k: int) -> dict[str, Any]:
    """A position of a choice's logprobs: never more than max(k, 1) candidates, the written token among them."""
    candidates = [{"token_id": v, "logprob": p, "rank": r} for v, p, r in _ranked(row, token, k)]
    return {**candidates[0], "top_logprobs": candidates[: max(k, 1)]}
