"""Templates are rendered in a process of their own, with limits of memory and of processor time.

A chat template is a program that comes with somebody's model, and that of a prompt comes with somebody's recipe. Jinja's
sandbox keeps it from Python's objects, not from a loop without end or from a text of gigabytes. So one child process renders
the templates of this process: it gets a template once, then messages, and answers with the text. It has `MEMORY_BYTES` above
what it takes to start, `CPU_SEC` for one text, may write no file, and does not have the secrets of the environment. A
template that exceeds a limit ends the child, and the next text starts a new one.

Requests and answers are JSON behind their length (8 bytes). The cost is 0.3 ms of processor time a rendering, and
once 1 to 2 s for the start.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from typing import Any, BinaryIO, Protocol

from kdata.errors import ConfigError, DataError, TeacherError, public_environment

CPU_SEC = 2.0
MEMORY_BYTES = 1 << 30
LONGEST_TEXT = 64 << 20  # characters
_LENGTH = struct.Struct("<Q")
Span = tuple[int, int]  # characters [begin, end)


class TemplateRefusal(DataError):
    """A template does not render a chat: it raises an error, or the chat does not suit it."""


class TemplateLimitError(TemplateRefusal):
    """A template takes too much time or memory for one text."""


class NeedsDateError(ConfigError):
    """A template asks for today's date, and none is set."""


class Renderer(Protocol):
    """What renders a template."""

    def check(self, template: str) -> None:
        """Raise ConfigError where a template is not valid Jinja, as transformers compiles it."""

    def render(self, template: str, request: dict[str, Any]) -> tuple[str, list[Span] | None]:
        """The text of a chat, and what the template marks as written by the assistant if `marked` asks for it.

        Args:
            request: messages, tools, generation_prompt, marked, variables, date (YYYY-MM-DD or null).
        Raises:
            TemplateRefusal, NeedsDateError: see there.
        """


class TemplateProcess:
    """The child process; started by the first request, and again where it ended. Safe to use from several threads.

    Args:
        cpu_sec: processor time for one text.
    """

    def __init__(self, cpu_sec: float = CPU_SEC) -> None:
        self._cpu_sec = cpu_sec
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._numbers: dict[str, int] = {}

    def check(self, template: str) -> None:
        """See `Renderer.check`."""
        answer = self._ask({"check": template})
        if "invalid" in answer:
            line = answer["line"]
            raise ConfigError(
                f"chat_template is not valid Jinja{f' (line {line})' if line else ''}: {answer['invalid']}"
            )

    def fill(self, template: str, values: dict[str, Any]) -> str:
        """The text of a template that is no chat's. A name that has no value is refused, and the last line break stays.

        Args:
            values: by name, as JSON has them.
        Raises:
            TemplateRefusal: the template is not valid Jinja, raises an error, or exceeds a limit.
        """
        answer = self._ask({"values": values}, template)
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        return str(answer["text"])

    def render(self, template: str, request: dict[str, Any]) -> tuple[str, list[Span] | None]:
        """See `Renderer.render`."""
        answer = self._ask(request, template)
        if "date" in answer:
            raise NeedsDateError(
                "the model's chat template writes today's date, so that tomorrow the same chat would have other tokens; set "
                "template_date: YYYY-MM-DD"
            )
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        marks = answer["marks"]
        return answer["text"], None if marks is None else [(begin, end) for begin, end in marks]

    def _ask(self, request: dict[str, Any], template: str | None = None) -> dict[str, Any]:
        with self._lock:
            process = self._started()
            if template is not None:
                is_new = template not in self._numbers
                number = self._numbers.setdefault(template, len(self._numbers))
                request = {**request, "number": number, **({"template": template} if is_new else {})}
            assert process.stdin is not None and process.stdout is not None
            try:
                _send(process.stdin, request)
                return _receive(process.stdout)
            except (EOFError, BrokenPipeError) as error:
                raise self._limit(process) from error
            except (
                BaseException
            ):  # Ctrl-C between request and answer: the answer would be taken for that of the next one
                self.close()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():  # after a fork the pipes are the parent's
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kdata.corpus.template_process", str(self._cpu_sec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=public_environment(),
            )  # fmt: skip
            self._owner, self._numbers = os.getpid(), {}
            assert self._process.stdout is not None
            try:
                _receive(self._process.stdout)
            except EOFError as error:
                status = self._process.wait()
                self._process = None
                raise TeacherError(
                    f"the process that renders chat templates ended while it started (exit status {status}); run "
                    f"`{sys.executable} -m kdata.corpus.template_process {CPU_SEC:g}` to see why"
                ) from error
        return self._process

    def _limit(self, process: subprocess.Popen[bytes]) -> TemplateLimitError:
        """Why the child ended."""
        status = process.wait()
        self._process = None
        if status == -signal.SIGPROF:
            return TemplateLimitError(f"it takes more than {self._cpu_sec:g} s of processor time for one text")
        return TemplateLimitError(f"it ends the process that renders it (exit status {status})")

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()


def _send(stream: BinaryIO | Any, message: dict[str, Any]) -> None:
    # What JSON does not have (a date in a message) becomes the text that a template would write for it.
    content = json.dumps(message, default=str).encode()
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> dict[str, Any]:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    message: dict[str, Any] = json.loads(content)
    return message


RENDERER = TemplateProcess()
atexit.register(RENDERER.close)

# ------------------------------------------------------------------------------------------------------------ the child


class _NoDateError(Exception):
    """The template asks for the date, and there is none."""


def _limit_this_process() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # elsewhere the system does not limit the address space
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))


def _answer(request: dict[str, Any], templates: dict[int, str]) -> dict[str, Any]:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    errors = (
        jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
        MemoryError,
    )  # fmt: skip
    if "check" in request:
        try:
            _compile_jinja_template(request["check"])
        except errors as error:
            return {"invalid": _reason(error), "line": getattr(error, "lineno", None)}
        return {}
    if "template" in request:
        templates[request["number"]] = request["template"]
    if "values" in request:
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        try:
            text = environment.from_string(templates[request["number"]]).render(request["values"])
        except errors as error:
            return {"refused": _reason(error)}
        return _text(text, None)

    def now(layout: str) -> str:
        if request["date"] is None:
            raise _NoDateError
        return datetime.date.fromisoformat(request["date"]).strftime(layout)

    try:
        rendered: Any = render_jinja_template(
            conversations=[request["messages"]], tools=request["tools"], chat_template=templates[request["number"]],
            add_generation_prompt=request["generation_prompt"], return_assistant_tokens_mask=request["marked"],
            **{**request["variables"], "strftime_now": now},
        )  # fmt: skip
        [text], marks = rendered
    except _NoDateError:
        return {"date": None}
    except errors as error:
        return {"refused": _reason(error)}
    return _text(text, marks[0] if request["marked"] else None)


def _text(text: str, marks: list[Span] | None) -> dict[str, Any]:
    if len(text) > LONGEST_TEXT:
        return {"refused": f"its text has more than {LONGEST_TEXT:,} characters"}
    return {"text": text, "marks": marks}


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_BYTES >> 20:,} MiB of memory"
    return str(error)[:2000] or type(error).__name__


def _serve(cpu_sec: float) -> None:
    """Answer requests from stdin on stdout until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    import transformers.utils.chat_template_utils  # noqa: F401  # counts as memory of the start

    _limit_this_process()
    _send(answers, {})
    templates: dict[int, str] = {}
    while True:
        try:
            request = _receive(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_sec)  # its signal ends the process
        answer = _answer(request, templates)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(answers, answer)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
