"""Hidden states of every token, in a sidecar `hidden/NAME/` beside the dataset (`kdata hidden`); the payload is not changed.

A part is one safetensors file for a shard, with its rows one after another in the shard's order:

    hidden_states         bfloat16 or float8_e4m3fn [T, L, D]
    hidden_states_scales  float32 [T, L, 1], of float8 alone: a state is its numbers times its scale
    token_ids             int32 [T]
    offsets               int64 [rows + 1], where each row begins

`layers` of NAME.json names the L slots. A number i is the residual stream after i layers of the model (0: the embeddings),
before the final norm, as vLLM counts `eagle_aux_hidden_state_layer_ids`. `head` is what the model's head multiplies: the
state after the last layer and the final norm. State t has read tokens 0 ... t, so it predicts token t + 1, whose
distribution the dataset keeps at position t + 1.

Shapes: T tokens, L slots, D width of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field, ValidationError

from kdata.config import first_problem
from kdata.errors import ConfigError, CorruptError, DependencyError, MissingError, OutOfRangeError
from kdata.format.manifest import write_json
from kdata.format.schema import Contract, Digest, FileInfo, ManifestEntry, TeacherInfo, json_digest
from kdata.store.index import damaged
from kdata.store.listed import HIDDEN, Kind, Listing, read_listing, refuse_other_dataset
from kdata.store.pretrained import safetensors_header

if TYPE_CHECKING:
    import torch

Slot = int | Literal["head"]
Width = Literal["bfloat16", "float8_e4m3fn"]
SAFETENSORS = {"bfloat16": ("BF16", 2), "float8_e4m3fn": ("F8_E4M3", 1)}  # its name there, and bytes of a number
TOKEN_BYTES = 4  # of its id
SCALE_BYTES = 4


class HiddenInfo(Contract):
    """hidden/NAME.json."""

    name: str = Field(description="Name of the hidden states.")
    model: TeacherInfo = Field(description="The model that read the tokens.")
    tokenizer_hash: str = Field(description="Its tokenizer, the same as the dataset's.")
    dataset_digest: str = Field(
        alias="dataset_fingerprint", description="Content digest of the dataset whose tokens were read."
    )
    dataset_identity: Digest = Field(description="`fingerprint` of that dataset.")
    layers: list[Slot] = Field(
        min_length=1,
        description="What each slot holds: i, the residual stream after i layers, or head, what the head multiplies.",
    )
    num_layers: int = Field(ge=1, description="Layers of the model.")
    width: int = Field(ge=1, description="Numbers of a state.")
    dtype: Width = Field(description="Type of the stored numbers.")
    head_digest: Digest | None = Field(
        description="SHA-256 of the model's head (kdata.teachers.hidden.head_digest); null where it is not of a known kind."
    )
    files: dict[str, FileInfo] = Field({}, description="Parts by path inside the dataset, each once it is written.")
    digest: str = Field("", description="SHA-256 of everything else in the file; shows a damaged byte.")

    @property
    def bytes_per_token(self) -> int:
        """What a token takes, all slots together."""
        return bytes_per_token(len(self.layers), self.width, self.dtype)

    @property
    def own_digest(self) -> str:
        """SHA-256 (hex) of what decides the numbers: the same for all parts."""
        return json_digest(self.model_dump(exclude={"files", "dataset_digest", "digest"}))

    def slot(self, layer: Slot) -> int:
        """The slot of a layer. Raises MissingError where it is not stored."""
        if layer not in self.layers:
            raise MissingError(f"hidden states {self.name!r} have the layers {self.layers}, not {layer!r}")
        return self.layers.index(layer)


class HiddenSource(Protocol):
    """What reading hidden states needs of a dataset."""

    path: Path
    manifest: list[ManifestEntry]
    shard_starts: np.ndarray

    def listing(self, kind: Kind, name: str) -> Listing:
        """What NAME.json says of a complete set."""
        ...

    def fetch_hidden(self, name: str) -> None:
        """Copy hidden/NAME.json here where the dataset is elsewhere."""
        ...

    def hidden_part(self, relative: str, info: FileInfo) -> Path:
        """A part whose bytes were compared with its digest."""
        ...


def bytes_per_token(slots: int, width: int, dtype: Width) -> int:
    """Bytes that a token takes: its states, their scales, its id."""
    scales = SCALE_BYTES * slots if dtype == "float8_e4m3fn" else 0
    return slots * width * SAFETENSORS[dtype][1] + scales + TOKEN_BYTES


def load_hidden_info(source: Any, name: str) -> HiddenInfo:
    """Read hidden/NAME.json, of a complete set or not.

    Raises:
        ConfigError: an invalid name. MissingError: there is none. CorruptError: it is damaged. MismatchError: it is of
            another dataset.
    """
    if not name.isidentifier():
        raise ConfigError(f"{name!r} is not a valid name; use letters, digits and _, beginning with a letter")
    source.fetch_hidden(name)
    path = source.path / HIDDEN.folder / f"{name}.json"
    listing, content = read_listing(path, HIDDEN)
    refuse_other_dataset(listing, HIDDEN, source.info.identity_digest, source.path)
    try:
        return HiddenInfo.model_validate(content)
    except ValidationError as error:
        raise CorruptError(
            f"{path} is damaged ({first_problem(error)}); remove it and run `{HIDDEN.command}` again"
        ) from error


def write_hidden_info(root: Path, info: HiddenInfo) -> None:
    """Write hidden/NAME.json."""
    write_json(root / HIDDEN.folder / f"{info.name}.json", info.model_dump())


def shard_digest(entry: ManifestEntry) -> str:
    """SHA-256 (hex) of a shard's payload: which tokens a part is of."""
    return entry.files[f"data/{entry.name}.arrow"].sha256


def check_part(path: Path, info: HiddenInfo, entry: ManifestEntry) -> str | None:
    """What is wrong with a part by its header alone: which shard and set it is of, types and shapes; None: nothing."""
    try:
        header = safetensors_header(path)
    except (ConfigError, OSError) as error:
        return f"cannot be used: {error}"
    about = header.pop("__metadata__", {})
    if about.get("kdata.shard") != shard_digest(entry) or about.get("kdata.hidden") != info.own_digest:
        return f"is of another shard, or of other hidden states than {info.name!r}"
    tokens, slots = entry.tokens, len(info.layers)
    expected = {
        "hidden_states": (SAFETENSORS[info.dtype][0], [tokens, slots, info.width]),
        "token_ids": ("I32", [tokens]),
        "offsets": ("I64", [entry.rows + 1]),
    }
    if info.dtype == "float8_e4m3fn":
        expected["hidden_states_scales"] = ("F32", [tokens, slots, 1])
    actual = {name: (tensor.get("dtype"), tensor.get("shape")) for name, tensor in header.items()}
    return None if actual == expected else f"holds {actual}, but {expected} belongs there"


class HiddenStates:
    """Hidden states by row, read from their file row by row.

    Raises:
        MissingError: there are none, they are not complete, or of another state of the dataset.
        MismatchError: they are of another dataset.
        CorruptError: the JSON is damaged.
        DependencyError: torch or safetensors is not installed.
    """

    def __init__(self, source: HiddenSource, name: str) -> None:
        self.info = load_hidden_info(source, name)
        source.listing(HIDDEN, name)
        self._source = source
        self._open: tuple[int, Any] | None = None  # the part that was read last

    def row(self, row: int) -> tuple[np.ndarray, torch.Tensor]:
        """Token ids int32 [T] of a row, and its states [T, L, D]: bfloat16, or float32 where float8 is stored.

        Raises as `stored`.
        """
        tensors = self.stored(row)
        states_TLD = tensors["hidden_states"]
        if self.info.dtype == "float8_e4m3fn":
            states_TLD = states_TLD.float() * tensors["hidden_states_scales"]
        return tensors["token_ids"].numpy(), states_TLD

    def stored(self, row: int) -> dict[str, torch.Tensor]:
        """The tensors of a row as they are stored, by name: hidden_states, token_ids, perhaps hidden_states_scales.

        Raises OutOfRangeError where there is no such row, CorruptError where its part is not what was committed.
        """
        if not 0 <= row < self._source.shard_starts[-1]:
            raise OutOfRangeError(f"there is no row {row}; the dataset has {int(self._source.shard_starts[-1]):,}")
        shard = int(np.searchsorted(self._source.shard_starts, row, side="right")) - 1
        part, within = self._part(shard), row - int(self._source.shard_starts[shard])
        begin, end = (int(value) for value in part.get_slice("offsets")[within : within + 2])
        names = [name for name in part.keys() if name != "offsets"]  # noqa: SIM118  # safe_open is no mapping
        return {name: part.get_slice(name)[begin:end] for name in names}

    def _part(self, shard: int) -> Any:
        if self._open is None or self._open[0] != shard:
            try:
                from safetensors import safe_open
            except ModuleNotFoundError as error:
                raise DependencyError(f"hidden states need {error.name!r}: pip install 'kdata[train]'") from error
            entry = self._source.manifest[shard]
            relative = HIDDEN.part(self.info.name, entry.name)
            path = self._source.hidden_part(relative, self.info.files[relative])
            if reason := check_part(path, self.info, entry):
                raise damaged(path, reason)
            part: Any = safe_open(path, framework="pt")
            offsets = part.get_tensor("offsets").numpy()
            if offsets[0] != 0 or offsets[-1] != entry.tokens or (np.diff(offsets) < 0).any():
                raise damaged(path, "its offsets do not rise from 0 to the number of tokens")
            self._open = shard, part
        return self._open[1]


def forget_part(root: Path, name: str, relative: str) -> None:
    """Take a part out of hidden/NAME.json, so that the next `kdata hidden` writes it again."""
    _, content = read_listing(root / HIDDEN.folder / f"{name}.json", HIDDEN)
    info = HiddenInfo.model_validate(content)
    files = {path: file for path, file in info.files.items() if path != relative}
    write_hidden_info(root, info.model_copy(update={"files": files}))
