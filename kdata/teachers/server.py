"""A served vLLM as a teacher, over HTTP: token ids in and out, with several servers of one model at once.

Servers return the top k, so the kinds `topk` and `adaptive` can be captured, but nothing that needs the full distribution.
`wire.py` has the requests and answers, `endpoints.py` handles servers that do not answer.

A run uses one of two paths of the server:
    /inference/v1/generate  of a server started with --enable-scale-out: it decodes no text, which makes it 1.9 to 2.7
                            times as fast, and it writes with log-probabilities in one pass
    /v1/completions         of every server: it does not return the rank of a written token, so written text is read in a
                            second pass, as is structured output, whose log-probabilities are masked (0.32). For the same
                            reason it reads one token less than --max-model-len: start such a server with one more
Measured with teacher-10m, k=64, two cores for all: 4.7k and 1.7 to 2.2k tokens/s; 4.4 and 4.5 kB of JSON a token. JSON to
readouts: 50 to 60k tokens/s per core (msgspec into typed structs; with orjson half of it), enough for ten servers.

At the start and after each failure a server is inspected: its model, version, length and tokenizer, whether its
log-probabilities are raw and normalized, whether k of them are allowed, and whether they agree with the other servers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from kdata.errors import ConfigError, MismatchError, MissingError, TeacherError, first_line, settings_difference
from kdata.format.keep import KeepConfig
from kdata.format.schema import TeacherInfo
from kdata.store.gguf import model_folder
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens, readout_from_top
from kdata.teachers.config import SamplingConfig, TeacherConfig, refuse_kept
from kdata.teachers.endpoints import Endpoint, Endpoints, RefusedError
from kdata.teachers.model import load_tokenizer, model_identity
from kdata.teachers.wire import (
    COMPLETIONS,
    Answer,
    Logprobs,
    Top,
    answer_about,
    decode,
    is_distribution,
    joined,
    new_tokens,
    request,
    top_of_prompt,
    top_of_written,
)

PROBE_TEXT = "The fox\n\tdef f(x): return 2 # naïve 日本🙂"
PROBE_WRITTEN, PROBE_TEMPERATURE = 8, 2.0
# A written token's log-probability, processed at that temperature, is off by more than a nat; raw ones differ from those of a
# second pass by rounding only, 0.05 nats in bfloat16.
RAW_NATS = 0.5


class Model(msgspec.Struct):
    """A model that a server has; an adapter has a `parent`, and no length of its own."""

    id: str
    parent: str | None = None
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """All of them."""

    data: list[Model]


class Version(msgspec.Struct):
    """Of vLLM."""

    version: str


@dataclass(frozen=True)
class Served:
    """Who a server is. logprobs: float32 [T], what it believes of the probe."""

    model: str
    version: str
    max_model_len: int
    generates: bool
    logprobs: np.ndarray

    def settings(self) -> dict[str, Any]:
        """What must be equal between endpoints, by the name under which an error shows it."""
        return {
            "model": self.model,
            "vLLM": self.version,
            "--max-model-len": self.max_model_len,
            "--enable-scale-out": self.generates,
        }


class ServedTeacher:
    """Servers of one model. See `Teacher`.

    Raises:
        ConfigError: a server refuses the token, the model's name or k; its log-probabilities are not raw.
        MismatchError: a server's tokenizer is another one, or the servers differ.
        UnreachableError: none answers.
    """

    def __init__(self, config: TeacherConfig, *, max_k: int) -> None:
        assert config.server is not None
        self._config, self._max_k = config.server, max_k
        name, commit, weights_hash = _identity(config)
        self._model = config.model
        self._probe: list[int] = load_tokenizer(config.model, commit)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        self.vocab_size = _vocab_size(model_folder(config.model), commit)
        self._first: Served | None = None
        self._endpoints = Endpoints(config.server, self._inspect)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._endpoints.start()
            self.context = _context(config, self._served)
            undo.pop_all()
        self.info = TeacherInfo(
            model=name,
            revision=commit,
            weights_hash=weights_hash,
            backend="vllm-server",
            backend_version=self._served.version,
            dtype="as served",
            logprobs="raw log-softmax at temperature 1",
            deterministic=False,
            bos=config.bos,
        )

    @property
    def _served(self) -> Served:
        assert self._first is not None
        return self._first

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Read sequences; see `Teacher.read`. Raises as `Endpoints.ask` does."""
        refuse_kept(keep, "vllm-server")
        return self._endpoints.map(lambda ids: self._read(ids, keep, on_tokens), list(sequences))

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        """Continue prompts; see `Teacher.write`. Raises as `Endpoints.ask` does."""
        refuse_kept(keep, "vllm-server")
        items = list(zip(prompts, seeds, strict=True))
        return self._endpoints.map(lambda item: self._write(item[0], item[1], keep, sampling, on_tokens), items)

    def close(self) -> None:
        """Cut what is under way."""
        self._endpoints.close()

    async def _read(self, ids: np.ndarray, keep: KeepConfig, on_tokens: OnTokens = ignore_tokens) -> Readout:
        """Read one sequence. The server also writes one token, which is thrown away: its engine needs a step.

        That step needs a place. Where a sequence leaves none, its own last token is the one that is written.
        """
        params: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": keep.k}
        if len(ids) < self._served.max_model_len:
            top = await self._ask(
                ids, params, keep.k, lambda answer: top_of_prompt(answer, ids, keep.k, self.vocab_size)
            )
        else:
            prompt, last = ids[:-1], ids[-1:]
            # The written token counts as one of them, even where it is none of the k most probable.
            params |= {"logprobs": keep.k + 1, "allowed_token_ids": last.tolist()}

            def parse(answer: Answer) -> Top:
                return joined(
                    top_of_prompt(answer, prompt, keep.k, self.vocab_size),
                    top_of_written(answer, last, keep.k, self.vocab_size),
                )

            top = await self._ask(prompt, params, keep.k + 1, parse)
        on_tokens(len(ids))
        return _readout(ids, 1, top, keep)

    async def _write(
        self, prompt: np.ndarray, seed: int, keep: KeepConfig, sampling: SamplingConfig, on_tokens: OnTokens
    ) -> Completion:
        structure = sampling.structured_output
        in_one_pass = self._served.generates and structure is None
        params = {
            **sampling.model_dump(include={"temperature", "top_p", "top_k", "min_p", "min_tokens", "stop"}),
            "max_tokens": min(sampling.max_tokens, self.context - len(prompt)),
            "seed": seed,
            # The written token counts as one of them, even where it is none of the k most probable.
            "logprobs": keep.k + 1 if in_one_pass else None,
            "structured_outputs": structure and structure.model_dump(exclude_none=True),
        }

        def parse(answer: Answer) -> tuple[np.ndarray, Literal["stop", "length"], Top | None]:
            new, finish = new_tokens(answer)
            return new, finish, top_of_written(answer, new, keep.k, self.vocab_size) if in_one_pass else None

        new, finish, top = await self._ask(prompt, params, keep.k + 1, parse)
        on_tokens(len(new))
        whole, start = np.concatenate([prompt, new]).astype(np.int32), len(prompt)
        if top is not None:
            return Completion(_readout(whole, start, top, keep), start, finish)
        read = await self._read(whole, keep)
        return Completion(read.only(np.arange(len(whole)) >= start), start, finish)

    async def _ask(self, ids: np.ndarray, params: dict[str, Any], most: int, parse: Any) -> Any:
        """What `parse` makes of the answer; most: log-probabilities that are asked for."""
        served = self._served
        path, body = request(served.model, served.generates, ids.tolist(), params)
        with _explained(most):
            return await self._endpoints.ask(path, body, lambda content: parse(answer_about(content, ids)))

    # ----------------------------------------------------------------------------------------------------- inspection

    async def _inspect(self, endpoint: Endpoint) -> None:
        """Ask an endpoint who it is. Raises ConfigError, MismatchError or TeacherError where it is not wanted."""
        with _explained(self._max_k):
            models = decode(Models, await self._endpoints.send(endpoint, "/v1/models")).data
            name, longest = self._named(models, endpoint), max((m.max_model_len or 0 for m in models), default=0)
            version = decode(Version, await self._endpoints.send(endpoint, "/version")).version
            await self._check_tokenizer(endpoint, name)
            generates, whole, reported = await self._probe_writing(endpoint, name)
            top = await self._probe_reading(endpoint, name, generates, whole)
        apart = np.abs(reported - top.logprob[-PROBE_WRITTEN:]).mean()
        if not (apart <= RAW_NATS and is_distribution(top.logprobs, self.vocab_size)):
            raise ConfigError(
                f"{endpoint.url}: its log-probabilities are not the raw ones; start it with --logprobs-mode raw_logprobs"
            )
        logprobs = top.logprob[: len(self._probe) - 1]
        self._agree(endpoint, Served(name, version, longest, generates, logprobs))

    def _named(self, models: list[Model], endpoint: Endpoint) -> str:
        """The model's name as served: the one that is asked for, or the first that is no adapter."""
        known, asked = [model.id for model in models], self._config.name
        if asked is None and known:
            return next((model.id for model in models if model.parent is None), known[0])
        if asked is None or asked not in known:
            raise ConfigError(f"{endpoint.url} serves {known}, not server.name={asked!r}; take one of those")
        return asked

    async def _check_tokenizer(self, endpoint: Endpoint, name: str) -> None:
        body = {
            "model": name,
            "prompt": PROBE_TEXT,
            "add_special_tokens": False,
            "max_tokens": 1,
            "return_token_ids": True,
        }
        answer = decode(Answer, await self._endpoints.send(endpoint, COMPLETIONS, body))
        theirs = answer.choices[0].prompt_token_ids if answer.choices else None
        if theirs != self._probe:
            raise MismatchError(
                f"{endpoint.url} cuts a text into other token ids than the tokenizer of {self._model}; name the model that "
                "is served there"
            )

    async def _probe_writing(self, endpoint: Endpoint, name: str) -> tuple[bool, np.ndarray, np.ndarray]:
        """Whether it has /inference/v1/generate; the probe with the tokens written after it; their reported logprobs."""
        params = {
            "max_tokens": PROBE_WRITTEN, "ignore_eos": True, "temperature": PROBE_TEMPERATURE, "logprobs": 0,
        }  # fmt: skip
        probe, generates = np.array(self._probe, np.int32), True
        try:
            content = await self._endpoints.send(endpoint, *request(name, True, self._probe, params))
        except RefusedError as error:
            if error.status not in (403, 404):
                raise
            generates = False
            content = await self._endpoints.send(endpoint, *request(name, False, self._probe, params))
        answer = answer_about(content, probe)
        new, _ = new_tokens(answer)
        logprobs = answer.choices[0].logprobs or Logprobs()
        values = [w.logprob for w in logprobs.content] if logprobs.content else logprobs.token_logprobs
        if len(new) != PROBE_WRITTEN or values is None or len(values) != len(new):
            raise TeacherError(f"{endpoint.url} did not write {PROBE_WRITTEN} tokens with their log-probabilities")
        return generates, np.concatenate([probe, new]), np.array(values)

    async def _probe_reading(self, endpoint: Endpoint, name: str, generates: bool, ids: np.ndarray) -> Top:
        params = {"max_tokens": 1, "prompt_logprobs": self._max_k}
        content = await self._endpoints.send(endpoint, *request(name, generates, ids.tolist(), params))
        return top_of_prompt(answer_about(content, ids), ids, self._max_k, self.vocab_size, check=False)

    def _agree(self, endpoint: Endpoint, served: Served) -> None:
        """The first one says who the teacher is; the others must be the same."""
        if self._first is None:
            self._first = served
            return
        difference = settings_difference(self._first.settings(), served.settings())
        if difference:
            raise MismatchError(f"{endpoint.url} is not served as the others are (theirs -> its own):\n{difference}")
        apart = float(np.abs(self._first.logprobs - served.logprobs).mean())
        if not apart <= self._config.tolerance_nats:
            raise MismatchError(
                f"{endpoint.url} believes otherwise than the others: its log-probabilities differ by {apart:.2g} nats on "
                f"average (server.tolerance_nats={self._config.tolerance_nats:g}); serve the same weights with the same dtype"
            )


@contextmanager
def _explained(most: int) -> Iterator[None]:
    """What no other row would change is a ConfigError, with its remedy."""
    try:
        yield
    except RefusedError as error:
        remedy = {
            401: "server.auth_env names the environment variable that holds the token",
            403: "server.auth_env names the environment variable that holds the token",
            404: "is it vLLM's server, without --tokens-only, and server.name one of its models?",
        }.get(error.status)
        if "logprobs" in str(error) and "max allowed" in str(error):
            remedy = f"start the server with --max-logprobs {most}, or lower k"
        if remedy is None:
            raise
        raise ConfigError(f"{error}; {remedy}") from error


def _readout(ids: np.ndarray, start: int, top: Top, keep: KeepConfig) -> Readout:
    return readout_from_top(ids, start, top.logprob, top.rank, top.ids, top.logprobs, keep)


def _identity(config: TeacherConfig) -> tuple[str, str | None, str | None]:
    """As `model_identity`; a folder without weights, as only the servers have them, is known by its name."""
    path = Path(config.model)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return path.resolve().name, None, None
    return model_identity(config)


def _vocab_size(model: str, commit: str | None) -> int:
    """Rows of the head, from the model's configuration."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=commit, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MissingError(f"no configuration at {model!r}: {first_line(error)}") from error
    return int(config.get_text_config().vocab_size)


def _context(config: TeacherConfig, served: Served) -> int:
    """Longest sequence.

    Reading needs one step of the engine, and that step a place. /inference/v1/generate can let the last token be the one that
    is written; /v1/completions does not return the rank of that, so there one place stays free.
    """
    context = config.context or served.max_model_len
    if context > served.max_model_len:
        raise ConfigError(f"context={context} exceeds the server's --max-model-len {served.max_model_len}; lower it")
    return context if served.generates else min(context, served.max_model_len - 1)
