"""Several HTTP servers that are one teacher: which server gets a request, and what happens when one does not answer.

A request goes to the ready endpoint with the fewest requests under way. A lost request (connection refused or reset,
timeout, 429, 502, 503, 504) is sent again; a refused one (any other 4xx) is not. An endpoint that lost a request gets no
other until it is inspected again, with growing pauses, so that a server that comes back with another model is refused. The
run ends when no endpoint was ready for `patience_sec`.

A vLLM server that is stopped behaves in two special ways (measured, 0.32). After SIGTERM it closes its port, but keeps open
connections and never answers on them; so the health of a server at work is also checked, on a separate connection. When its
engine dies it answers 500; so after a 500 its health decides whether the request is at fault.

Everything runs in one event loop in a thread of its own: callers wait in their threads, notebooks work, and no state needs a
lock. The token is only in the headers of the sessions; no exception of the HTTP client that carries headers leaves this
module.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import msgspec

from kdata.errors import ConfigError, KdataError, TeacherError, UnreachableError, never_show
from kdata.teachers.config import ServerConfig

logger = logging.getLogger(__name__)
TRANSIENT = (429, 502, 503, 504)
BACKOFF_SEC, MOST_DOUBLINGS = 0.25, 6  # pause before an inspection, doubled with every failure in a row: up to 16 s
HEARTBEAT_SEC, HEALTH_TIMEOUT_SEC, CONNECT_TIMEOUT_SEC = 5.0, 10.0, 30.0
LONGEST_MESSAGE = 500  # characters of what a server says that are passed on
T = TypeVar("T")


class LostError(Exception):
    """A request had no answer, for a reason that may pass; this error never leaves the teacher.

    accepted: the server had taken the request, so the request may be the cause. pause_sec: the pause that the server asks
    for.
    """

    def __init__(self, reason: str, *, accepted: bool = True, pause_sec: float = 0.0) -> None:
        super().__init__(reason)
        self.accepted, self.pause_sec = accepted, pause_sec


class RefusedError(TeacherError):
    """A server refused a request: sent again it would be refused again."""

    status = 0


@dataclass(eq=False)
class Endpoint:
    """One server. failures: in a row, without a request that was answered."""

    url: str
    ready: bool = False
    outstanding: int = 0
    failures: int = 0
    trouble: str = ""
    inspecting: asyncio.Task[None] | None = None
    deadlines: set[asyncio.Timeout] = field(default_factory=set)


class Endpoints:
    """The servers of one teacher.

    Args:
        config: where they are and how long they are waited for.
        inspect: checks an endpoint. Raises LostError where it does not answer, KdataError where it cannot be used.
    Raises:
        ConfigError: the environment variable of the token is not set.
    """

    def __init__(self, config: ServerConfig, inspect: Callable[[Endpoint], Awaitable[None]]) -> None:
        self._config, self._inspect = config, inspect
        self._token = _token(config.auth_env)
        self.endpoints = [Endpoint(url) for url in config.urls]
        self._fatal: BaseException | None = None
        self._sessions: list[aiohttp.ClientSession] = []
        self._asked_all = False
        # Not anyio's BlockingPortal: it would be one more dependency, and an interrupted call must be cancelled by hand too.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kdata-endpoints", daemon=True)
        self._thread.start()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._dark_since: float | None = None

    # ------------------------------------------------------------------------------------------- for callers' threads

    def start(self) -> None:
        """Inspect all endpoints; return once one is ready and each was inspected.

        Raises:
            UnreachableError: none has answered for `patience_sec`.
            KdataError: as `inspect` raises it, for any of them.
        """
        self._run(self._start())

    def map(self, work: Callable[[Any], Coroutine[Any, Any, T]], items: list[Any]) -> list[T]:
        """Results of a coroutine for every item, in order; the first failure cancels the others. Raises as `ask` does."""
        return self._run(self._map(work, items))

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        if self._loop.is_closed():
            return
        self._run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit, CancelledError):
            future.cancel()
            raise

    # ---------------------------------------------------------------------------------------------------- in the loop

    async def _start(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        # max_concurrency is the only limit; the time for a request begins when it is sent.
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_SEC),
        )
        self._own_line = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_SEC),
        )
        self._sessions = [self._session, self._own_line]
        self._heart = self._task(self._beat())
        await _all(self._first(endpoint) for endpoint in self.endpoints)
        self._asked_all = True
        self._note_dark()
        await self._until(lambda: any(e.ready for e in self.endpoints))

    async def _first(self, endpoint: Endpoint) -> None:
        try:
            await self._inspect(endpoint)
        except LostError as error:
            self._suspect(endpoint, error)
        else:
            self._admit(endpoint)

    async def _map(self, work: Callable[[Any], Coroutine[Any, Any, T]], items: list[Any]) -> list[T]:
        return await _all(work(item) for item in items)

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self._sessions:
            await session.close()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A background task. If it fails, all requests fail with its error instead of waiting forever."""
        task = asyncio.create_task(work)

        def end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._give_up(error)

        task.add_done_callback(end)
        return task

    async def ask(self, path: str, body: Any, parse: Callable[[bytes], T]) -> T:
        """POST a request to a free endpoint, and again to another one if it is lost.

        Args:
            path: from the server's root.
            body: encoded as JSON.
            parse: reads the answer; raises LostError where the server aborted it.
        Raises:
            RefusedError: the server refused the request.
            TeacherError: the request was lost more than `retries` times; or an error of `parse`.
            UnreachableError: no endpoint was ready for `patience_sec`.
        """
        lost, since = 0, None
        while True:
            endpoint = await self._free()
            try:
                result = parse(await self.send(endpoint, path, body))
                endpoint.failures = 0
                return result
            except LostError as error:
                self._suspect(endpoint, error)
                now = self._loop.time()
                lost, since = lost + error.accepted, since or now
                if lost > self._config.retries or now - since > self._config.patience_sec:
                    raise TeacherError(
                        f"a request had no answer in {now - since:.0f} s and was lost {lost} times (server.retries="
                        f"{self._config.retries}), the last time by {endpoint.url}: {error}"
                    ) from error
            finally:
                endpoint.outstanding -= 1
                self._wake(1)

    async def _free(self) -> Endpoint:
        """Wait for a ready endpoint below its limit; take the one with the fewest requests and count one more there."""

        def open_ones() -> list[Endpoint]:
            return [e for e in self.endpoints if e.ready and e.outstanding < self._config.max_concurrency]

        await self._until(lambda: bool(open_ones()))
        chosen = min(open_ones(), key=lambda e: e.outstanding)
        chosen.outstanding += 1
        return chosen

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the endpoints holds. Raises the error that ended the run, if there is one."""
        while self._fatal is None and not condition():
            waiting = self._loop.create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                self._wake(1)  # let another one use what woke this one
                raise
        if self._fatal is not None:
            raise self._fatal

    def _wake(self, number: int | None = None) -> None:
        """Wake the first `number` of those that wait for an endpoint, or all."""
        woken = 0
        while self._waiting and woken != number:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                woken += 1

    async def send(self, endpoint: Endpoint, path: str, body: Any = None) -> bytes:
        """Send one request, POST if it has a body; the content of an answer with status 200.

        Raises:
            LostError: no answer, or a status in TRANSIENT.
            RefusedError: any other status.
            ConfigError: the connection cannot be made secure.
        """
        garbled = ""
        try:
            async with asyncio.timeout(self._config.timeout_sec) as deadline:
                endpoint.deadlines.add(deadline)
                try:
                    status, content, pause = await self._exchange(endpoint.url + path, body)
                finally:
                    endpoint.deadlines.discard(deadline)
        except aiohttp.ClientSSLError as error:
            raise ConfigError(
                f"{endpoint.url}: no secure connection ({self._shown(str(error))}); check the URL"
            ) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise LostError(f"no connection ({self._shown(str(error))})", accepted=False) from None
        except TimeoutError:
            raise LostError("no answer in time") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise LostError(f"connection lost ({self._shown(str(error))})") from None
        except aiohttp.ClientError as error:
            garbled = type(error).__name__  # the error itself carries the request's headers
        if garbled:
            raise TeacherError(f"{endpoint.url}: the answer is no HTTP ({garbled}); check the URL")
        if status == 200:
            return content
        message = self._shown(_message(content))
        if status in TRANSIENT:
            raise LostError(f"HTTP {status} {message}", accepted=status in (502, 504), pause_sec=pause)
        if status == 500 and await self._healthy(endpoint) is False:
            raise LostError(f"its engine died: {message}")
        refused = RefusedError(f"{endpoint.url}{path} answered HTTP {status}: {message}")
        refused.status = status
        raise refused

    async def _exchange(self, url: str, body: Any) -> tuple[int, bytes, float]:
        """Status, content, and the seconds that the server asks the client to wait."""
        method, data = ("GET", None) if body is None else ("POST", msgspec.json.encode(body))
        headers = {} if body is None else {"Content-Type": "application/json"}
        # A redirect would send the token to another server.
        async with self._session.request(method, url, data=data, headers=headers, allow_redirects=False) as response:
            pause = response.headers.get("Retry-After", "")
            return response.status, await response.read(), float(pause) if pause.isdecimal() else 0.0

    def _shown(self, text: str) -> str:
        """A message of a server, shortened and without the token."""
        text = text.replace(self._token, "***") if self._token else text
        return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."

    # ------------------------------------------------------------------------------------------- endpoints in trouble

    def _admit(self, endpoint: Endpoint) -> None:
        endpoint.ready, self._dark_since = True, None
        self._wake()

    def _suspect(self, endpoint: Endpoint, error: LostError) -> None:
        """Send no request to an endpoint until it is inspected again."""
        endpoint.trouble = str(error)
        if endpoint.inspecting is not None and not endpoint.inspecting.done():
            return
        endpoint.ready = False
        self._note_dark()
        endpoint.inspecting = self._task(self._revive(endpoint, error.pause_sec))

    async def _revive(self, endpoint: Endpoint, pause_sec: float) -> None:
        """Inspect an endpoint until it is ready, is refused, or no endpoint was ready for too long."""
        begun = self._loop.time()
        logger.warning("%s: %s; it gets no request until it is inspected", endpoint.url, endpoint.trouble)
        while True:
            longest = BACKOFF_SEC * 2 ** min(endpoint.failures, MOST_DOUBLINGS)
            endpoint.failures += 1
            await asyncio.sleep(max(random.uniform(longest / 2, longest), min(pause_sec, self._config.patience_sec)))
            try:
                await self._inspect(endpoint)
            except LostError as error:
                endpoint.trouble, pause_sec = str(error), error.pause_sec
                if self._dark_for() > self._config.patience_sec:
                    return self._give_up(self._unreachable())
            except KdataError as error:
                endpoint.trouble = str(error)
                logger.error("%s is not used any more: %s", endpoint.url, error)
                if not any(e is not endpoint and (e.ready or _is_inspected(e)) for e in self.endpoints):
                    self._give_up(error)
                return
            else:
                logger.warning("%s: ready again after %.1f s", endpoint.url, self._loop.time() - begun)
                return self._admit(endpoint)

    def _note_dark(self) -> None:
        """Start the clock of `patience_sec` if no endpoint is ready, once each was inspected."""
        if self._asked_all and self._dark_since is None and not any(e.ready for e in self.endpoints):
            self._dark_since = self._loop.time()

    def _dark_for(self) -> float:
        """Seconds since an endpoint was ready."""
        return 0.0 if self._dark_since is None else self._loop.time() - self._dark_since

    def _give_up(self, error: BaseException) -> None:
        self._fatal = error
        self._wake()

    def _unreachable(self) -> UnreachableError:
        reasons = "; ".join(f"{e.url}: {e.trouble}" for e in self.endpoints)
        return UnreachableError(
            f"no endpoint has answered for {self._dark_for():.0f} s (server.patience_sec={self._config.patience_sec:g}). "
            f"{reasons}. What was committed is kept; start the server, then run the same command again"
        )

    async def _beat(self) -> None:
        """Check the health of servers at work; cancel the requests of one that closed its port or lost its engine."""
        while True:
            await asyncio.sleep(HEARTBEAT_SEC)
            for endpoint in [e for e in self.endpoints if e.deadlines]:
                if await self._healthy(endpoint) is False:
                    self._suspect(endpoint, LostError("it is shutting down, or its engine is dead"))
                    self._cut(endpoint)

    def _cut(self, endpoint: Endpoint) -> None:
        """Let all requests at an endpoint time out now."""
        for deadline in endpoint.deadlines:
            if not deadline.expired():
                deadline.reschedule(self._loop.time())

    async def _healthy(self, endpoint: Endpoint) -> bool | None:
        """Whether a server is healthy; None where that is unknown (it is too busy, or a gateway hides it)."""
        try:
            async with self._own_line.get(endpoint.url + "/health", allow_redirects=False) as response:
                return {200: True, 500: False, 502: False, 503: False, 504: False}.get(response.status)
        except TimeoutError:
            return None
        except aiohttp.ClientConnectorError:
            return False
        except aiohttp.ClientError:
            return None


async def _all(work: Any) -> list[Any]:
    """Results of coroutines, in order; the first that fails ends the others, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _is_inspected(endpoint: Endpoint) -> bool:
    return endpoint.inspecting is not None and not endpoint.inspecting.done()


def _token(variable: str | None) -> str | None:
    """The token from the environment; it is never shown."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ConfigError(f"server.auth_env names the variable {variable}, which is not set; put the token there")
    never_show(token)
    if not token.isprintable() or not token.isascii():
        raise ConfigError(f"the token in {variable} has characters that are not allowed in a header; set it again")
    return token


def _message(content: bytes) -> str:
    """The error message in an answer: from vLLM's JSON, or else the beginning of the answer."""
    try:
        answer = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return content[: 4 * LONGEST_MESSAGE].decode("utf-8", "replace")
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)
