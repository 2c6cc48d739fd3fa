"""Share a dataset: verify it, write its card, and copy it to a folder or to the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdata.check.secret_texts import refuse_secrets
from kdata.check.verify import FOLDERS, verify
from kdata.errors import ConfigError, CorruptError, DependencyError, StorageError
from kdata.format.files import inside, local_path, lock_of, without_hidden
from kdata.share.arrange import new_folder
from kdata.share.card import card_page, cost_of, write_card
from kdata.store.dataset import Dataset
from kdata.store.hub import hub_errors, hub_name
from kdata.store.listed import HIDDEN, PLANS, SCORES, read_listing
from kdata.store.open import open_dataset


def push(
    dataset: Dataset,
    destination: str | Path,
    *,
    public: bool = False,
    allow_secrets: bool = False,
    hidden: bool = False,
) -> str:
    """Verify a dataset, look for secrets in its texts, and copy it, with its card, to a folder or to the Hub.

    On the Hub it takes the place of the dataset that was there, in one commit: shards, scores and plans that it does not
    have are deleted. Other files of the repository stay.

    Args:
        destination: a folder that does not exist yet (or is empty), or hf://OWNER/NAME.
        public: Hub only: whether a new repository is public; otherwise it is private.
        allow_secrets: do not look for secrets in the texts.
        hidden: also share hidden states (`kdata hidden`), which are many times as large as everything else.
    Returns:
        The folder, or the address on the Hub.
    Raises:
        CorruptError: the dataset, or the copy, is not whole.
        DataError: a text holds what looks like a secret; see `kdata.check.secret_texts`.
        ConfigError: the folder is not free, the Hub name is not valid, or `destination` is another URL.
        DependencyError: the Hub's client is not installed.
        StorageError: the disk or the Hub refused, or a process is writing to the dataset or to the folder.
    """
    destination = str(destination)
    refuse_while_written(dataset)
    if destination.startswith("hf:"):
        _refuse_unfit(dataset, allow_secrets)
        return _push_to_hub(dataset, destination, public, hidden)
    target = local_path(destination, "push copies to a folder or to the Hub (hf://OWNER/NAME)")
    with new_folder(target) as folder:
        _refuse_unfit(dataset, allow_secrets)
        for relative in dataset_files(dataset, hidden=hidden):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(dataset.path / relative, folder / relative)
        write_card(open_dataset(folder), cost=cost_of(dataset))
        if differences := verify(open_dataset(folder)):
            refuse_while_written(dataset)
            raise CorruptError(
                f"the copy of {dataset.path} was not whole and is removed ({differences[0].path} {differences[0].what}): the "
                "dataset changed meanwhile, or the disk is failing. Run the same command again."
            )
    return str(target)


def _refuse_unfit(dataset: Dataset, allow_secrets: bool) -> None:
    problems = [problem for problem in verify(dataset) if not problem.stray]  # what belongs to nothing stays behind
    if problems:
        listing = "\n".join(f"  {p.path} {p.what}" for p in problems[:10])
        raise CorruptError(
            f"{dataset.path} is damaged and was not shared; repair it first (kdata repair {dataset.path}):\n{listing}"
        )
    if not allow_secrets:
        refuse_secrets(dataset)


def refuse_while_written(dataset: Dataset) -> None:
    """Raise StorageError where a process is writing to the dataset: a copy could hold half of its change."""
    holder = lock_of(dataset.path).holder()
    if holder is not None:
        raise StorageError(f"{dataset.path} is being written by {holder}; share it when that has finished")


def dataset_files(dataset: Dataset, *, hidden: bool = False) -> list[str]:
    """Relative paths of all files that belong to a verified dataset: shards, sidecars, plans, tokenizer, card.

    Args:
        hidden: also hidden states.
    """
    files = ["dataset.json", "manifest.jsonl"]
    files += [relative for entry in dataset.manifest for relative in entry.files]
    for kind in (SCORES, PLANS, *([HIDDEN] if hidden else [])):
        for name in dataset.listed(kind):
            info, _ = read_listing(dataset.path / kind.folder / f"{name}.json", kind)
            own = info.files_of(kind) or ([f"plans/{name}.parquet"] if kind is PLANS else [])
            files += [f"{kind.folder}/{name}.json", *sorted(own)]
    recorded = dataset.info.tokenizer_files or [
        p.name for p in without_hidden(dataset.path, "tokenizer/*") if p.is_file()
    ]
    files += [f"tokenizer/{name}" for name in sorted(recorded)]
    files += ["README.md"] if (dataset.path / "README.md").is_file() else []
    for relative in files:
        inside(dataset.path, relative)  # refuses a link, which would share a file from elsewhere
    return files


def _push_to_hub(dataset: Dataset, destination: str, public: bool, hidden: bool) -> str:
    name = hub_name(destination)
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.errors import LocalTokenNotFoundError
    except ModuleNotFoundError as error:
        raise DependencyError("sharing on the Hub needs huggingface_hub: pip install 'kdata[hub]'") from error
    # The card goes up from memory: the dataset may be read-only, or somebody else's.
    files: dict[str, Path | bytes] = {
        relative: dataset.path / relative for relative in dataset_files(dataset, hidden=hidden)
    }
    files["README.md"] = card_page(dataset)
    api = HfApi()
    try:
        url = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        commit, there = _files_there(api, name)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(relative, content) for relative, content in files.items()),
            *(CommitOperationDelete(relative) for relative in left_over(there, files)),
        ]
        api.create_commit(
            repo_id=name,
            repo_type="dataset",
            operations=operations,
            parent_commit=commit,  # refused where somebody else pushed since
            commit_message=f"kdata dataset {dataset.content_digest[:12]}",
        )
    except LocalTokenNotFoundError as error:
        raise ConfigError("the Hub needs a token: set HF_TOKEN, or run `hf auth login`") from error
    except hub_errors() as error:
        raise StorageError(f"the Hub refused {name}: {error}; check HF_TOKEN, the name and the network") from error
    return str(url)


def _files_there(api: Any, name: str) -> tuple[str | None, list[str]]:
    """The newest commit of a repository, and the paths of its files."""
    commit = api.dataset_info(name).sha
    return commit, api.list_repo_files(name, revision=commit, repo_type="dataset")


def left_over(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Files of a former dataset that are not in the new one; none where the repository does not hold a dataset of kdata."""
    former = set(there)
    if not {"dataset.json", "manifest.jsonl"} <= former:
        return []
    return sorted(path for path in former - set(new) if path.partition("/")[0] in FOLDERS and "/" in path)
