"""Scores, plans and hidden states as the JSON beside them describes them: which files they have, and of which dataset.

A file that the JSON does not list does not count. SQL, selection and verify all read the JSON here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from kdata.config import first_problem
from kdata.errors import CorruptError, DataError, MismatchError, MissingError
from kdata.format.files import without_hidden
from kdata.format.json_text import read_json
from kdata.format.manifest import digest_of
from kdata.format.schema import Contract, Digest, FileInfo


@dataclass(frozen=True)
class Kind:
    """Scores, plans or hidden states: the folder, one of them in words, the command that writes one, how its files end.

    The folder of scores and of plans is also the name of their SQL schema.
    """

    folder: str
    noun: str
    command: str
    suffix: str = ".parquet"

    def part(self, name: str, shard: str) -> str:
        """Path of the part of a shard inside the dataset; scores and hidden states have parts."""
        return f"{self.folder}/{name}/{shard}{self.suffix}"


SCORES = Kind("scores", "score", "kdata score")
HYGIENE = "kdata hygiene"  # writes a score with `settings`
MARGINS = "kdata score DATASET --margins"  # writes the score `margin`
PLANS = Kind("plans", "plan", "kdata select")
HIDDEN = Kind("hidden", "set of hidden states", "kdata hidden", ".safetensors")
KINDS = (SCORES, PLANS, HIDDEN)
COPIED = ".copied"  # in the folder of a score: its parts are copies from a URL, and were not made here


class Listing(Contract):
    """What NAME.json says of all kinds alike; see `ScoreInfo`, `PlanInfo` and `HiddenInfo`."""

    name: str
    dataset_digest: str = Field(alias="dataset_fingerprint")
    dataset_identity: Digest | None = None
    columns: list[str] = Field([])
    files: dict[str, FileInfo] = Field({})
    table: FileInfo | None = None
    settings: dict[str, Any] | None = None
    digest: str = ""

    @property
    def command(self) -> str:
        """The command that writes such a score."""
        return SCORES.command if self.settings is None else HYGIENE

    def files_of(self, kind: Kind) -> dict[str, FileInfo]:
        """Its files by path inside the dataset; none of a score that is not complete, or of a plan before version 1.0.

        Of hidden states that are not complete: those that are written so far.
        """
        if kind is not PLANS:
            return self.files
        return {} if self.table is None else {f"plans/{self.name}.parquet": self.table}


def listed(root: Path, kind: Kind) -> list[str]:
    """Names of those of a kind that have a JSON, in order."""
    return [path.stem for path in without_hidden(root, f"{kind.folder}/*.json")]


def read_listing(path: Path, kind: Kind) -> tuple[Listing, dict[str, Any]]:
    """Read NAME.json: what all kinds have in common, and all that it holds.

    Raises:
        MissingError: there is none.
        CorruptError: it is damaged, or it is of another name: the file was renamed or copied.
    """
    remedy = f"remove it and run `{kind.command}` again"
    if not path.is_file():
        names = ", ".join(listed(path.parent.parent, kind)) or "none"
        raise MissingError(
            f"there is no {kind.noun} {path.stem!r}: {path} does not exist ({kind.folder}: {names}); write it with "
            f"`{MARGINS if kind is SCORES and path.stem == 'margin' else kind.command}`"
        )
    try:
        content = read_json(path)
        if kind is SCORES and content.get("settings") is not None:
            remedy = f"remove it and run `{HYGIENE}` again"
        listing = Listing.model_validate(content)
    except ValidationError as error:
        raise CorruptError(
            f"{path} is damaged: it does not describe a {kind.noun} ({first_problem(error)}); {remedy}"
        ) from error
    except DataError as error:
        raise CorruptError(f"{path} is damaged: it does not describe a {kind.noun} ({error}); {remedy}") from error
    if listing.digest and listing.digest != digest_of(content):
        raise CorruptError(f"{path} does not match its own digest; {remedy}")
    if listing.name != path.stem:
        raise CorruptError(
            f"{path} is the {kind.noun} {listing.name!r}, renamed or copied; give its files their name back, or {remedy}"
        )
    return listing, content


def refuse_other_dataset(listing: Listing, kind: Kind, identity_digest: str, place: Path) -> None:
    """Raise MismatchError where a score or plan names another dataset. Those of older versions name none."""
    if listing.dataset_identity not in (None, identity_digest):
        raise MismatchError(
            f"{kind.noun} {listing.name!r} was written for another dataset than {place}: another teacher, tokenizer, codec "
            f"or vocabulary (fingerprint {str(listing.dataset_identity)[:12]}, here {identity_digest[:12]}); remove it, and "
            f"run `{listing.command if kind is SCORES else kind.command}` again"
        )
