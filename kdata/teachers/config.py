"""Settings of a teacher: which model, what runs it, how it samples."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from kdata.config import Strict
from kdata.errors import ConfigError, has_secret
from kdata.format.keep import KeepConfig
from kdata.teachers.engine_args import refuse_engine_args


class ServerConfig(Strict):
    """Addresses of vLLM servers and how long to wait for them. Not part of a dataset's identity."""

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
        description="Times that a request is sent again after a server lost it; after that the request counts as failed.",
    )
    patience_sec: float = Field(
        600.0,
        gt=0,
        description="Seconds that no endpoint answers before the run gives up; the restart of a server takes minutes.",
    )
    tolerance_nats: float = Field(
        0.1, gt=0, description="Largest mean difference of two endpoints' log-probabilities of the same tokens."
    )

    @field_validator("auth_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and (not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name) or has_secret(name)):
            raise ValueError(
                "it must be the name of an environment variable, in capital letters, digits and _ (the value is not repeated "
                "here: it may be the token itself). Write export TOKEN=... and auth_env: TOKEN"
            )
        return name

    @model_validator(mode="after")
    def _plain_urls(self) -> ServerConfig:
        for url in self.endpoints:
            parts = urlsplit(url)
            if parts.username is not None or parts.password is not None:
                # Not quoted: it is a secret.
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
    """Model and backend of a teacher, and how it computes."""

    model: str = Field(
        description="Folder of a Hugging Face model, a GGUF file, or a Hub name. Of a served vLLM the tokenizer and "
        "config.json suffice."
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
    bos: Literal["add", "omit"] | None = Field(
        None,
        description="Beginning-of-sequence token, where the tokenizer puts none before a text. add: before every text and "
        "prompt; omit: nowhere. null: nowhere, and the run stops if the model reads clearly worse without it.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="Arithmetic of the forward pass; auto takes the checkpoint's."
    )
    context: int | None = Field(
        None,
        gt=1,
        description="Longest sequence in tokens; null takes the model's own limit. vLLM itself is given the length of the "
        "longest sequence that it will read or write, so a large limit takes no memory.",
    )
    lora: str | None = Field(
        None, description="Folder of a LoRA adapter that the model is read and written with (vllm); null: none."
    )
    engine_args: dict[str, Any] = Field(
        {},
        description="Further arguments of vLLM's engine by their own names, for instance quantization: fp8 (vllm). Refused: "
        "what other settings decide, and what would run code from elsewhere.",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one copy of the model is spread over (vllm).")
    memory_fraction: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory that vLLM may take.")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Memory for the key-value cache in GiB (vllm). null: on a CPU sized by the longest sequence and the free "
        "memory, on a GPU what memory_fraction leaves.",
    )
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

    @model_validator(mode="after")
    def _engine(self) -> TeacherConfig:
        for name in ("engine_args", "lora"):
            if self.backend != "vllm" and getattr(self, name):
                remedy = "start the server with it" if self.backend == "vllm-server" else "use backend vllm"
                raise ValueError(f"{name} would be ignored by backend {self.backend}; {remedy}")
        refuse_engine_args(self.engine_args)
        return self


class StructuredOutput(Strict):
    """A form that every completion must have, enforced by the engine token by token; one of three.

    Tokens that violate the form are not written, but stay in the recorded distribution.
    """

    json_schema: dict[str, Any] | None = Field(None, description="JSON Schema of the document that is written.")
    regex: str | None = Field(None, description="Regular expression that the whole completion matches.")
    choice: list[str] | None = Field(None, min_length=1, description="Texts of which it is one.")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutput:
        forms = self.model_dump(exclude_none=True)
        if len(forms) != 1:
            raise ValueError(f"structured_output takes one of json_schema, regex and choice, not {len(forms)} of them")
        return self


class SamplingConfig(Strict):
    """How text is sampled. The recorded distribution is the raw one at temperature 1, whatever these settings are."""

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
    """Raise ConfigError where a structured output is asked of a backend that cannot write one."""
    if sampling.structured_output is not None:
        raise ConfigError(f"the {backend} teacher does not write structured output; use backend vllm or vllm-server")


def refuse_kept(keep: KeepConfig, backend: str) -> None:
    """Raise ConfigError where a backend that sees only the top k is asked for more."""
    if backend == "vllm-server" and keep.needs_full_distribution:
        raise ConfigError(
            f"a served vLLM returns the top k only; {keep.why_full_distribution} needs the full distribution, "
            "and no start option makes a server send it (extract_hidden_states of vLLM 0.32 writes to its own disk): "
            "take kind=topk or adaptive without temperatures or positions by entropy, or backend vllm where the model is"
        )
