"""The files of a dataset on the Hub: one commit, with what is new and without what is no longer part.

Large files go up before it in groups, so that what was sent stays sent when a push breaks off. The Hub advises fewer than 100
files in a commit, because those of a longer upload fail late; here only names and digests are left for the commit, whose
limit is 25,000 large files. Files of a repository that no commit names are not seen by anybody.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdata.check.verify import FOLDERS
from kdata.errors import ConfigError, DependencyError, StorageError
from kdata.format.files import file_info
from kdata.store.hub import hub_errors
from kdata.store.url import WAIT, is_limit

TAG = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,62}[A-Za-z0-9])?")  # our default: what any version is called
_WRITTEN_BY_ANOTHER = 412  # the newest commit is no longer the one that a new one was made for
_NO_RIGHT = (401, 403)
GROUP_FILES, GROUP_BYTES = 100, 2 << 30  # of what goes up together; our default


def refuse_tag(tag: str | None) -> None:
    """Raise ConfigError where a tag's name is none."""
    if tag is not None and (TAG.fullmatch(tag) is None or ".." in tag or tag.endswith(".lock")):
        raise ConfigError(
            f"--tag {tag!r}: a tag has up to 64 letters, digits, dots, hyphens and underscores, such as v1.0"
        )


def refuse_without_right_to_ask(name: str) -> None:
    """Raise ConfigError where the Hub takes no such name or there is no token, and DependencyError without its client.

    Nothing is asked of the Hub: this comes before a dataset is read.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public in its documentation
    except ModuleNotFoundError as error:
        raise DependencyError("sharing on the Hub needs huggingface_hub: pip install 'kdata[hub]'") from error
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"the Hub takes no such name: {_one_line(str(error))}") from error
    if get_token() is None:
        raise ConfigError("the Hub needs a token: set HF_TOKEN, or run `hf auth login`")


def push_to_hub(
    name: str,
    files: Mapping[str, Path | bytes],
    sha256: Mapping[str, str],
    *,
    message: str,
    public: bool,
    tag: str | None,
    is_last: bool = True,
) -> tuple[str, int]:
    """Make `files` the dataset in a repository, in one commit; with nothing to change there is none.

    What the newest commit has with the same digest is not sent. Shards, scores and plans of a former dataset that are not in
    `files` are deleted (`left_over`), and other files stay. The Hub keeps what was sent for a commit that did not come
    about, so that the same command again sends the rest.

    Args:
        name: OWNER/NAME; made where there is none.
        files: relative path to content.
        sha256: digests of some of the files, in hexadecimal; the others are read.
        public: whether a new repository is public.
        tag: a name for the commit.
        is_last: False: the tag is for a later commit, and now it is only refused where it stands for another one.
    Returns:
        Its address, and how many files were sent.
    Raises:
        ConfigError: there is no token, the name is none, or the tag stands for another commit.
        DependencyError: the Hub's client is not installed.
        StorageError: the Hub refused, cannot be reached, or somebody else pushed meanwhile.
    """
    refuse_without_right_to_ask(name)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _errors(name):
        url = str(api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True))
        commit = api.dataset_info(name).sha
        there = dict(_files_there(api, name, commit))
        tagged = _commit_of_tag(api, name, tag) if tag else None
    changed = [path for path, content in files.items() if not _is_there(there.get(path), content, sha256.get(path))]
    gone = left_over(there, files)
    if tagged is not None and (changed or gone or tagged != commit):
        raise ConfigError(
            f"the tag {tag} of {name} stands for commit {tagged[:8]}, which is another state; name a new tag"
        )
    with _errors(name):
        if changed or gone:
            additions = [CommitOperationAdd(path, files[path]) for path in changed]
            for group in _groups(additions):
                api.preupload_lfs_files(name, group, repo_type="dataset")
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *additions,
                *(CommitOperationDelete(path) for path in gone),
            ]
            # Refused where the newest commit is another one by now.
            made = api.create_commit(
                name, operations, commit_message=message, repo_type="dataset", parent_commit=commit
            )
            commit = made.oid
        if tag and tagged is None and is_last:
            api.create_tag(name, tag=tag, revision=commit, repo_type="dataset")
    return url, len(changed)


def _groups(additions: list[Any]) -> Iterator[list[Any]]:
    """Additions of a commit, in order, that go up together."""
    group: list[Any] = []
    size = 0
    for addition in additions:
        if group and (len(group) == GROUP_FILES or size + addition.upload_info.size > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(addition)
        size += addition.upload_info.size
    yield group


def left_over(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Files of a former dataset that are not in the new one; none where the place does not hold a dataset of kdata."""
    former = set(there)
    if not {"dataset.json", "manifest.jsonl"} <= former:
        return []
    return sorted(path for path in former - set(new) if path.partition("/")[0] in FOLDERS and "/" in path)


def _files_there(api: Any, name: str, commit: str | None) -> Iterator[tuple[str, tuple[str, str]]]:
    """Path of each file of a commit, with the kind of its digest and the digest."""
    for entry in api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset"):
        if hasattr(entry, "blob_id"):  # a folder has none
            yield entry.path, ("sha256", entry.lfs.sha256) if entry.lfs else ("git", entry.blob_id)


def _is_there(there: tuple[str, str] | None, content: Path | bytes, sha256: str | None) -> bool:
    if there is None:
        return False
    kind, digest = there
    if kind == "sha256" and sha256 is not None:
        return digest == sha256
    if kind == "sha256" and isinstance(content, Path):
        return digest == file_info(content).sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    if kind == "sha256":
        return digest == hashlib.sha256(data).hexdigest()
    return digest == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _commit_of_tag(api: Any, name: str, tag: str) -> str | None:
    """The commit that a tag stands for; None where there is no such tag."""
    tags = api.list_repo_refs(name, repo_type="dataset").tags
    return next((str(one.target_commit) for one in tags if one.name == tag), None)


@contextmanager
def _errors(name: str) -> Iterator[None]:
    # RuntimeError where an upload breaks off, ValueError where the store of large files refuses one.
    failures: tuple[type[BaseException], ...] = (*hub_errors(), RuntimeError, ValueError)
    try:
        yield
    except failures as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code == _WRITTEN_BY_ANOTHER:
            raise StorageError(
                f"somebody else pushed to {name} meanwhile; look at it, then run the same command"
            ) from error
        if code in _NO_RIGHT:
            raise StorageError(
                f"the Hub does not let this token write to {name} ({code}); set HF_TOKEN to one that has the right to, or "
                "name a repository of your own"
            ) from error
        if is_limit(error):
            raise StorageError(
                f"the Hub refused {name}: {_cause(error)}; {WAIT}, then run the same command: what was sent is not sent again"
            ) from error
        raise StorageError(
            f"the Hub refused {name}: {_cause(error)}; check HF_TOKEN, the name and the network, then run the same command: "
            "what was sent is not sent again"
        ) from error


def _cause(error: BaseException) -> str:
    """What the Hub says, or else what became of the connection, in one line: the client's text has several."""
    if said := getattr(error, "server_message", None):
        return _one_line(said)
    lines = [
        str(one).strip().splitlines() or [type(one).__name__] for one in (error, error.__cause__) if one is not None
    ]
    return " ".join(lines[0]) if len(lines) == 1 else f"{lines[0][0]} ({lines[1][0]})"


def _one_line(text: str) -> str:
    return " ".join(text.split())
