"""Share a dataset: verify it, write its card, and copy it to a folder, to the Hub or to another URL."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kdata.calls import validated
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, StorageError
from kdata.format.files import inside, local_path, lock_of, without_hidden
from kdata.format.schema import FileInfo
from kdata.share.arrange import new_folder
from kdata.share.fitness import About
from kdata.share.hub_push import push_to_hub, refuse_tag, refuse_without_right_to_ask
from kdata.share.publication import publication
from kdata.share.url_push import push_to_url
from kdata.store.dataset import Dataset
from kdata.store.hub import hub_name
from kdata.store.listed import HIDDEN, KINDS, PLANS, SCORES, Kind, read_listing
from kdata.store.open import AnyDataset, open_dataset, opened


@validated
def push(
    dataset: AnyDataset,
    destination: str | Path,
    *,
    public: bool = False,
    about: About | None = None,
    tag: str | None = None,
    hidden: bool = False,
) -> str:
    """Verify a dataset, look whether it may be shared, and copy it, with its card, to a folder, the Hub or another URL.

    On the Hub it takes the place of the dataset that was there, in one commit; at a URL it may be the dataset that is there,
    and more. Only what is new is sent; shards, scores and plans that it does not have are deleted, and other files stay.

    Args:
        destination: a folder that does not exist yet (or is empty), hf://OWNER/NAME, or a URL such as s3://BUCKET/NAME.
        public: Hub only: whether a new repository is public; otherwise it is private.
        about: what only the one who shares knows, and which checks of `kdata.share.fitness` are left out.
        tag: Hub only: a name for this version, which hf://OWNER/NAME@TAG opens from then on.
        hidden: also share hidden states (`kdata hidden`), which are many times as large as everything else.
    Returns:
        The folder, or the address.
    Raises:
        CorruptError: the dataset, or the copy, is not whole.
        DataError: something is against sharing it, or a text holds what looks like a secret.
        ConfigError: the folder is not free, the Hub name is not valid, the tag stands for another version, or another
            dataset, or other shards, are at the URL.
        DependencyError: the Hub's client, or that of the URL, is not installed.
        StorageError: the disk or the Hub refused, or a process is writing to the dataset or to the folder.
    """
    dataset = opened(dataset)
    destination, about = str(destination), about or About()
    refuse_destination(destination, tag)
    refuse_while_written(dataset)
    if "://" in destination or destination.startswith("hf:"):
        _refuse_damaged(dataset)
        return publish(dataset, destination, public=public, about=about, tag=tag, hidden=hidden)
    target = local_path(destination, "push copies to a folder, to the Hub (hf://OWNER/NAME) or to a URL")
    with new_folder(target) as folder:
        _refuse_damaged(dataset)
        pages = publication(dataset, about)
        for relative in dataset_files(dataset, hidden=hidden):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(dataset.path / relative, folder / relative)
        for name, content in pages.items():
            (folder / name).write_bytes(content)
        if differences := verify(open_dataset(folder)):
            refuse_while_written(dataset)
            raise CorruptError(
                f"the copy of {dataset.path} was not whole and is removed ({differences[0].path} {differences[0].what}): the "
                "dataset changed meanwhile, or the disk is failing. Run the same command again."
            )
    return str(target)


def refuse_destination(destination: str, tag: str | None) -> None:
    """Raise ConfigError where a name on the Hub or a tag is none, a tag is given for another place, or a token is missing."""
    refuse_tag(tag)
    if destination.startswith("hf:"):
        refuse_without_right_to_ask(hub_name(destination))
    elif tag is not None:
        raise ConfigError(f"--tag names a version on the Hub, and {destination} is not there; leave it out")


def publish(
    dataset: Dataset,
    destination: str,
    *,
    public: bool = False,
    about: About,
    tag: str | None = None,
    hidden: bool = False,
    own: Mapping[str, bytes] | None = None,
    is_last: bool = True,
) -> str:
    """Send a dataset that is whole to the Hub or to a URL. Arguments, errors and result as `push`.

    Args:
        own: content of files that may change on the disk meanwhile.
        is_last: False: the tag is for a later state, and now it is only refused where it stands for another one.
    """
    name = hub_name(destination) if destination.startswith("hf:") else None
    if name is not None:
        about = replace(about, url=f"https://huggingface.co/datasets/{name}")
    # The card goes up from memory: the dataset may be read-only, or somebody else's.
    files: dict[str, Path | bytes] = {
        relative: dataset.path / relative for relative in dataset_files(dataset, hidden=hidden)
    }
    files |= {**(own or {}), **publication(dataset, about)}
    sha256 = {path: file.sha256 for entry in dataset.manifest for path, file in entry.files.items()}
    for kind in KINDS:
        for one in dataset.listed(kind):
            sha256 |= {path: file.sha256 for path, file in _files_of(dataset, kind, one).items()}
    if name is None:
        push_to_url(destination, dataset.info, dataset.manifest, files, sha256)
        return destination
    message = f"kdata dataset {dataset.content_digest[:12]}"
    return push_to_hub(name, files, sha256, message=message, public=public, tag=tag, is_last=is_last)[0]


def _refuse_damaged(dataset: Dataset) -> None:
    problems = [problem for problem in verify(dataset) if not problem.stray]  # what belongs to nothing stays behind
    if problems:
        listing = "\n".join(f"  {p.path} {p.what}" for p in problems[:10])
        raise CorruptError(
            f"{dataset.path} is damaged and was not shared; repair it first (kdata repair {dataset.path}):\n{listing}"
        )


def refuse_while_written(dataset: Dataset) -> None:
    """Raise StorageError where a process is writing to the dataset: a copy could hold half of its change."""
    holder = lock_of(dataset.path).holder()
    if holder is not None:
        raise StorageError(f"{dataset.path} is being written by {holder}; share it when that has finished")


def _files_of(dataset: Dataset, kind: Kind, name: str) -> dict[str, FileInfo]:
    """The files that the JSON of a score, plan or set of hidden states names."""
    return read_listing(dataset.path / kind.folder / f"{name}.json", kind)[0].files_of(kind)


def dataset_files(dataset: Dataset, *, hidden: bool = False) -> list[str]:
    """Relative paths of all files that belong to a verified dataset: shards, sidecars, plans, tokenizer, card.

    Args:
        hidden: also hidden states.
    """
    files = ["dataset.json", "manifest.jsonl"]
    files += [relative for entry in dataset.manifest for relative in entry.files]
    for kind in (SCORES, PLANS, *([HIDDEN] if hidden else [])):
        for name in dataset.listed(kind):
            own = list(_files_of(dataset, kind, name)) or ([f"plans/{name}.parquet"] if kind is PLANS else [])
            files += [f"{kind.folder}/{name}.json", *sorted(own)]
    recorded = dataset.info.tokenizer_files or [
        p.name for p in without_hidden(dataset.path, "tokenizer/*") if p.is_file()
    ]
    files += [f"tokenizer/{name}" for name in sorted(recorded)]
    files += ["README.md"] if (dataset.path / "README.md").is_file() else []
    for relative in files:
        inside(dataset.path, relative)  # refuses a link, which would share a file from elsewhere
    return files
