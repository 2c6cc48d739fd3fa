"""Sharing: a clean copy of a dataset in a folder, or on the Hub with the Hub's own client."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from kdata.card import made_by, write_card
from kdata.dataset import Dataset, open_dataset
from kdata.errors import ConfigError, CorruptError, DependencyError, MissingError, StorageError
from kdata.manifest import inside
from kdata.shard import storage_errors
from kdata.verify import verify

HUB_NAME = re.compile(r"^hf://(?:datasets/)?([\w.-]+/[\w.-]+)$")


def push(dataset: Dataset, destination: str, *, public: bool = False) -> str:
    """Copy a verified dataset, with its card, to a folder or to the Hub.

    Args:
        destination: a folder that does not exist yet (or is empty), or hf://OWNER/NAME.
        public: Hub only; private otherwise.
    Returns:
        Where it is now.
    Raises:
        CorruptError: the dataset is not whole.
        ConfigError: the destination is not free, or no Hub name.
        DependencyError: the Hub's client is not installed.
    """
    problems = verify(dataset)
    if problems:
        listing = "\n".join(f"  {p.path} {p.what}" for p in problems[:10])
        raise CorruptError(f"{dataset.path} is not whole, and is not shared so:\n{listing}")
    if destination.startswith("hf:"):
        return _push_to_hub(dataset, destination, public)
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
    with storage_errors(target):
        _copy(dataset, target)
    return str(target)


def _copy(dataset: Dataset, target: Path) -> None:
    """Copy what belongs to the dataset under a temporary name, then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    for relative in dataset_files(dataset):
        (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dataset.path / relative, temporary / relative)
    write_card(open_dataset(temporary), cost=made_by(dataset))
    if target.exists():
        target.rmdir()
    os.rename(temporary, target)


def dataset_files(dataset: Dataset) -> list[str]:
    """Relative paths of everything that belongs to a dataset: committed shards, sidecars, plans, tokenizer, card."""
    files = ["dataset.json", "manifest.jsonl"]
    files += [relative for entry in dataset.manifest for relative in entry.files]
    for pattern in (
        "scores/*.json",
        "scores/*/*.parquet",
        "plans/*.json",
        "plans/*.parquet",
        "tokenizer/*",
        "README.md",
    ):
        files += [p.relative_to(dataset.path).as_posix() for p in sorted(dataset.path.glob(pattern)) if p.is_file()]
    for relative in files:
        inside(dataset.path, relative)  # a link would share what lies behind it
    return files


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


def _push_to_hub(dataset: Dataset, destination: str, public: bool) -> str:
    name = hub_name(destination)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import LocalTokenNotFoundError
    except ModuleNotFoundError as error:
        raise DependencyError("sharing on the Hub needs huggingface_hub: pip install 'kdata[hub]'") from error
    write_card(dataset)
    api = HfApi()
    try:
        url = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=dataset.path,
            allow_patterns=dataset_files(dataset),
            commit_message=f"kdata dataset {dataset.fingerprint[:12]}",
        )
    except LocalTokenNotFoundError as error:
        raise ConfigError("the Hub needs a token: set HF_TOKEN, or run `hf auth login`") from error
    except hub_errors() as error:
        raise StorageError(f"the Hub refused {name}: {error}; check HF_TOKEN, the name and the network") from error
    return str(url)


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
