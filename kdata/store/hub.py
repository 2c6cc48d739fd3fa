"""Sharing: a clean copy of a dataset in a folder, or on the Hub with the Hub's own client."""

from __future__ import annotations

import re
from pathlib import Path

from kdata.errors import ConfigError, DependencyError, MissingError

HUB_NAME = re.compile(r"^hf://(?:datasets/)?([\w.-]+/[\w.-]+)$")


def hub_name(name: str) -> str:
    """OWNER/NAME out of hf://OWNER/NAME. Raises ConfigError."""
    match = HUB_NAME.match(name)
    if match is None:
        raise ConfigError(f"{name!r} is no Hub dataset; write hf://OWNER/NAME")
    return match[1]


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises when it is not there, refuses, or cannot be reached (its HTTP library's own)."""
    from huggingface_hub import errors

    http = {base for cls in errors.HfHubHTTPError.__mro__ for base in cls.__mro__ if base.__name__ == "HTTPError"}
    return (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError, *http)


def download(name: str) -> Path:
    """Download a Hub dataset with the Hub's client, into a folder of its own under HF_HOME, and return that."""
    repository = hub_name(name)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HOME
    except ModuleNotFoundError as error:
        raise DependencyError("opening a Hub dataset needs huggingface_hub: pip install 'kdata[hub]'") from error
    # A folder of its own: the client's cache is made of links that lead out of the dataset, which `inside` refuses.
    folder = Path(HF_HOME) / "kdata" / repository.replace("/", "--")
    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_dir=folder))
    except hub_errors() as error:
        raise MissingError(f"{name} cannot be downloaded: {error}; check the name, HF_TOKEN and the network") from error
