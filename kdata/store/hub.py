"""Datasets on the Hub: their names, the errors of the Hub's client, and a repository at one commit as a `Store`."""

from __future__ import annotations

import re

from kdata.errors import ConfigError, DependencyError, MissingError
from kdata.store.url import WAIT, Store, is_limit

ADDRESS = re.compile(r"^hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")


def hub_address(address: str) -> tuple[str, str | None]:
    """OWNER/NAME and REVISION (None: the main branch) of hf://OWNER/NAME@REVISION. Raises ConfigError."""
    match = ADDRESS.match(address)
    if match is None:
        raise ConfigError(
            f"{address!r} does not name a dataset on the Hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION"
        )
    return match["name"], match["revision"]


def hub_name(address: str) -> str:
    """OWNER/NAME of hf://OWNER/NAME, to write there. Raises ConfigError where a revision is named."""
    name, revision = hub_address(address)
    if revision is not None:
        raise ConfigError(f"{address!r} names a revision, which cannot be written; write hf://{name}")
    return name


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: not found, refused, or not reachable (errors of its HTTP library)."""
    from huggingface_hub import errors

    http = {base for cls in errors.HfHubHTTPError.__mro__ for base in cls.__mro__ if base.__name__ == "HTTPError"}
    return (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError, *http)


def _reason(error: Exception) -> str:
    """Why a repository cannot be opened, and what to do, in one line: the client's text has several."""
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub has no such revision; it was deleted or renamed, so name another branch, tag or commit"
    if isinstance(error, errors.GatedRepoError):
        return "access to it has to be granted; ask for it on its page, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such dataset, or HF_TOKEN has no right to see it; check the name and HF_TOKEN"
    if is_limit(error):
        return f"{WAIT}, then run the same command again"
    first = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first[0]}; check the name, HF_TOKEN and the network"


def _commit_of(address: str) -> str:
    """The commit that a branch or tag names now. Raises MissingError, DependencyError."""
    name, revision = hub_address(address)
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise DependencyError("opening a Hub dataset needs huggingface_hub: pip install 'kdata[hub]'") from error
    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except hub_errors() as error:
        raise MissingError(f"{address} cannot be opened: {_reason(error)}") from error
    if commit is None:
        raise MissingError(f"{address} has no commit yet; push a dataset there first")
    return commit


class HubStore(Store):
    """A dataset repository at one commit, which is looked up once: later changes on the Hub are not seen.

    Args:
        address: hf://OWNER/NAME, with @REVISION (branch, tag or commit) where it is not the main branch.
        commit: the commit; None looks it up.
    Raises:
        ConfigError: not such an address.
        MissingError: there is no such dataset, or the Hub cannot be reached.
        DependencyError: the Hub's client is not installed.
    """

    def __init__(self, address: str, commit: str | None = None) -> None:
        self.commit = commit or _commit_of(address)
        name, revision = hub_address(address)
        super().__init__(f"hf://datasets/{name}@{self.commit}")
        self.url = f"hf://{name}" + (f"@{revision}" if revision else "")  # in messages, and the name of the copy

    def client_errors(self) -> tuple[type[BaseException], ...]:
        """See `Store.client_errors`."""
        return hub_errors()

    def forget_listings(self) -> None:
        """Nothing: a commit does not change."""
