"""Copy a dataset, verified and with its card, to a folder or to the Hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, DependencyError, StorageError
from kdata.format.files import inside, storage_errors
from kdata.share.card import made_by, write_card
from kdata.store.dataset import Dataset
from kdata.store.hub import hub_errors, hub_name
from kdata.store.open import open_dataset


def push(dataset: Dataset, destination: str | Path, *, public: bool = False) -> str:
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
    destination = str(destination)
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
            commit_message=f"kdata dataset {dataset.content_digest[:12]}",
        )
    except LocalTokenNotFoundError as error:
        raise ConfigError("the Hub needs a token: set HF_TOKEN, or run `hf auth login`") from error
    except hub_errors() as error:
        raise StorageError(f"the Hub refused {name}: {error}; check HF_TOKEN, the name and the network") from error
    return str(url)
