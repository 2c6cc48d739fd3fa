"""Verify a dataset: every committed byte against its digest, every row against its index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdata.calls import validated
from kdata.errors import CorruptError, KdataError, ShapeError, first_line
from kdata.format.files import inside, lock_of, without_hidden
from kdata.format.json_text import MAX_DOCUMENT_BYTES, MAX_TOKENIZER_BYTES, parse_object, read_json
from kdata.format.kept import segment_sum
from kdata.format.manifest import digest_of, foreign, json_bytes, read_manifest
from kdata.format.plain import GET_FILES, is_pointer, is_special, open_plain
from kdata.format.schema import DatasetInfo, FileInfo, ManifestEntry, canonical_json, json_digest
from kdata.format.sequences import Sequences
from kdata.observe.progress import Task
from kdata.selection.plan import Plan
from kdata.selection.sidecar import SCORE_SCHEMA, ScoreInfo, load_score_info, read_ids
from kdata.store.dataset import Dataset
from kdata.store.hidden import check_part, load_hidden_info
from kdata.store.index import check_counts, damaged, read_index
from kdata.store.listed import HIDDEN, KINDS, PLANS, SCORES, Kind, read_listing, refuse_other_dataset
from kdata.store.open import AnyDataset, opened
from kdata.store.shard import check_header
from kdata.store.token_scores import TokenScore, has_tokens

CHANGED = "is not as kdata writes it: a flipped bit, or an editor's change"


@dataclass(frozen=True)
class Problem:
    """One difference from what was committed: the file's path inside the dataset, and what is wrong with it.

    stray: the file belongs to nothing. It changes no answer, and `push` leaves it behind.
    """

    path: str
    what: str
    stray: bool = False


# Beside the data: the card, and in a shared copy what was looked at before, and Croissant metadata. No answer needs them.
PAGES = ("README.md", "audit.json", "croissant.json")
# Folders in which every file is kdata's own.
FOLDERS = ("data", "index", "rejects", "scores", "plans", "hidden", "tokenizer")
STRAY = "belongs to nothing: no manifest line or JSON names it; a killed run left it, or a person added it"

TORN = (
    "ends in half a line, which nothing reads: a killed run left it, and the same command, run again, or `kdata repair` "
    "removes it; if no run was killed, the disk lost a part"
)


@validated
def verify(dataset: AnyDataset, *, deep: bool = False) -> list[Problem]:
    """Check every byte of a dataset except the card's (a person may edit it), and list files that do not belong to it.

    Shards, sidecars' parts, plans and the tokenizer's files are compared with their SHA-256. JSON files are compared with
    their own digest and with the one form in which kdata writes them, so that a flipped bit is found even where it changes
    no value.

    Args:
        deep: also decode every row and compare token ids with the index's content hashes, and ids across shards; and compare
            scores of tokens with the tokens of each row and its mean.
    Returns:
        Problems; empty where the dataset is whole.
    Raises:
        CorruptError: the dataset is at a URL or on the Hub, and a file there is not what was committed.
    """
    dataset = opened(dataset)
    dataset.fetch()
    writer = lock_of(dataset.path).holder()
    problems: list[Problem] = []
    total = sum(info.bytes for entry in dataset.manifest for info in entry.files.values())
    with Task("verify", total, "bytes") as task:
        for entry in dataset.manifest:
            for relative, info in entry.files.items():
                own = check_file(dataset.path, relative, info)
                if not own and relative.startswith("data/"):
                    own = check_shard(dataset.path, entry, dataset.info)
                elif not own and relative.startswith("index/"):
                    own = check_index(dataset.path, entry)
                problems += own
                task.advance(info.bytes)
    problems += check_json(dataset.path, "dataset.json") + check_json(dataset.path, "manifest.jsonl")
    problems += _tokenizer(dataset)
    for kind in KINDS:
        problems += _listed(dataset, kind)
    problems += _strays(dataset)
    if deep and not any(not problem.stray for problem in problems):
        problems += _deep(dataset)
    is_settled = writer is None and not _is_written(dataset)
    return problems if is_settled or not problems else _of_what_is_committed(dataset, problems)


def _is_written(dataset: Dataset) -> bool:
    """Whether a process is writing to the dataset, or has committed something since it was opened."""
    if lock_of(dataset.path).holder() is not None:
        return True
    try:
        return sorted(read_manifest(dataset.path), key=lambda entry: entry.name) != dataset.manifest
    except KdataError:
        return False


def _of_what_is_committed(dataset: Dataset, problems: list[Problem]) -> list[Problem]:
    """The problems of what was committed: not of files that a running process has not committed yet, or has replaced.

    A shard whose line is gone from the manifest was replaced (`kdata.jobs.changes`). The last line may be half written.
    """
    opened = {path for entry in dataset.manifest for path in entry.files}
    try:
        now = {path for entry in read_manifest(dataset.path) for path in entry.files}
    except KdataError:
        now = opened
    judged = (opened & now) | {f"tokenizer/{name}" for name in dataset.info.tokenizer_files} | {"dataset.json"}
    kept = [problem for problem in problems if problem.path in judged]
    if any(problem.path == "manifest.jsonl" for problem in problems):
        content = (dataset.path / "manifest.jsonl").read_bytes()
        kept += check_lines(content[: content.rfind(b"\n") + 1])
    return kept


def check_index(root: Path, entry: ManifestEntry) -> list[Problem]:
    """Compare the counts of a shard's index with its manifest line."""
    relative = f"index/{entry.name}.parquet"
    try:
        check_counts(inside(root, relative), entry)
    except KdataError as error:
        return [Problem(relative, str(error))]
    return []


def check_file(root: Path, relative: str, info: FileInfo) -> list[Problem]:
    """Compare one file with its committed size and digest."""
    if is_special(root / relative):
        return [Problem(relative, "is a pipe, a socket or a device, not a file")]
    path = inside(root, relative)
    if not path.is_file():
        return [Problem(relative, "is missing")]
    size = path.stat().st_size
    if size != info.bytes:
        if is_pointer(path):
            return [Problem(relative, GET_FILES)]
        return [Problem(relative, f"has {size:,} bytes, but {info.bytes:,} were committed")]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            return [Problem(relative, "differs from what was committed (SHA-256)")]
    return []


def check_shard(root: Path, entry: ManifestEntry, about: DatasetInfo) -> list[Problem]:
    """Compare a shard's manifest line and the metadata in its payload with the dataset."""
    where = f"data/{entry.name}.arrow"
    if reason := foreign(about, entry):
        return [Problem("manifest.jsonl", f"shard {entry.name} does not belong to this dataset: {reason}")]
    try:
        check_header(pa.ipc.open_file(pa.OSFile(str(inside(root, where)))), about, entry)
    except (pa.ArrowException, OSError, ShapeError) as error:
        return [Problem(where, f"is not a shard of this dataset: {error}")]
    return []


def unbound(dataset: Dataset) -> list[str]:
    """Names of shards that do not name their dataset, because an older kdata wrote them.

    Codec, vocabulary and tail of such a shard are compared; whether it is of another teacher or corpus cannot be known.
    """
    return [entry.name for entry in dataset.manifest if not entry.is_bound]


def outdated(dataset: Dataset) -> list[str]:
    """Scores, plans and hidden states of another state of the dataset, or of another of the same teacher: none is read."""
    names = []
    for kind in KINDS:
        for name in dataset.listed(kind):
            try:
                info, _ = read_listing(dataset.path / kind.folder / f"{name}.json", kind)
            except KdataError:  # `verify` says so
                continue
            if info.dataset_digest != dataset.content_digest:
                names.append(f"{kind.folder}.{name}")
    return names


def check_json(root: Path, relative: str) -> list[Problem]:
    """Compare a JSON file with its own digest and form, or each line of the manifest with its form."""
    path = root / relative
    if not path.exists():  # a dataset without shards has no manifest
        return []
    try:
        with open_plain(path) as file:
            if relative == "manifest.jsonl":
                return check_lines(file.read())
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        values = parse_object(content)
        if values.get("digest") != digest_of(values):
            return [Problem(relative, "does not match its own digest")]
        whole = json_bytes(values) == content
    except (OSError, ValueError, AttributeError) as error:  # OSError: a folder has its name
        return [Problem(relative, f"cannot be read: {error}")]
    return [] if whole else [Problem(relative, CHANGED)]


def check_lines(content: bytes) -> list[Problem]:
    """Compare each line of the manifest with its form.

    A last line that was not written to its end is ignored by readers. It is a problem nevertheless, because a disk that lost
    what was committed leaves the same.
    """
    end = content.rfind(b"\n") + 1
    if content[end:].startswith(b'{"') and b"\0" not in content[end:] and not content.endswith(b"}"):
        return [*check_lines(content[:end]), Problem("manifest.jsonl", TORN)]
    try:
        whole = b"".join(canonical_json(parse_object(line)) + b"\n" for line in content.splitlines()) == content
    except ValueError as error:
        return [Problem("manifest.jsonl", f"cannot be read: {error}")]
    return [] if whole else [Problem("manifest.jsonl", CHANGED)]


def _tokenizer(dataset: Dataset) -> list[Problem]:
    """The tokenizer's files must be the recorded ones, and the tokenizer the one that produced the token ids."""
    path = dataset.path / "tokenizer" / "tokenizer.json"
    recorded = dataset.info.tokenizer_files
    problems = [p for name, info in recorded.items() for p in check_file(dataset.path, f"tokenizer/{name}", info)]
    if problems or not path.is_file():
        return problems
    try:
        state = read_json(path, MAX_TOKENIZER_BYTES)
        digest = json_digest({key: value for key, value in state.items() if key not in ("truncation", "padding")})
    except (ValueError, AttributeError) as error:
        return [Problem("tokenizer/tokenizer.json", f"cannot be read: {error}")]
    if digest != dataset.info.tokenizer.hash:
        return [
            Problem("tokenizer/tokenizer.json", "is not the tokenizer that produced the token ids (its hash differs)")
        ]
    return []


def _listed(dataset: Dataset, kind: Kind) -> list[Problem]:
    """Those of a kind: their JSON, whether it is of this dataset and has its name, and the files that it lists."""
    problems: list[Problem] = []
    for name in dataset.listed(kind):
        where = f"{kind.folder}/{name}.json"
        own = check_json(dataset.path, where)
        if not own:
            try:
                info, _ = read_listing(dataset.path / where, kind)
                refuse_other_dataset(info, kind, dataset.info.identity_digest, dataset.path)
                for relative, file in info.files_of(kind).items():
                    own += check_file(dataset.path, relative, file)
                if not own and kind is PLANS:
                    _check_plan(dataset, Plan.load(dataset.path / "plans" / name))
                elif not own and kind is SCORES:
                    own += _score_parts(dataset, load_score_info(dataset, name))
                elif not own:
                    own += _hidden(dataset, name)
            except KdataError as error:
                own = [Problem(where, f"cannot be used: {first_line(error)}")]
        problems += own
    return problems


def _check_plan(dataset: Dataset, plan: Plan) -> None:
    """Repeats, and rows that the dataset has. Positions are compared where a plan is used. Raises KdataError."""
    if plan.info.positions is None and plan.info.dataset_digest == dataset.content_digest:
        dataset.rows_of(plan.ids)


def _score_parts(dataset: Dataset, info: ScoreInfo) -> list[Problem]:
    """Parts with an id twice, or with more rows than their shard: a join would count a row twice."""
    problems = []
    for entry in dataset.manifest:
        relative = SCORES.part(info.name, entry.name)
        if relative in info.files and info.dataset_digest == dataset.content_digest:
            ids = read_ids(dataset.path / relative)
            if len(ids) > entry.rows or len(ids.unique()) < len(ids):
                problems.append(
                    Problem(relative, f"has an id twice, or more than the {entry.rows:,} rows of its shard")
                )
    return problems


def _hidden(dataset: Dataset, name: str) -> list[Problem]:
    """The header of each part: which dataset and shard it is of, and shapes that fit the shard."""
    about = load_hidden_info(dataset, name)
    problems = []
    for entry in dataset.manifest:
        relative = HIDDEN.part(name, entry.name)
        if relative in about.files and about.dataset_digest == dataset.content_digest:
            reason = check_part(dataset.path / relative, about, entry)
            problems += [Problem(relative, reason)] if reason else []
    return problems


def _strays(dataset: Dataset) -> list[Problem]:
    """Files that nothing names, in every folder; of a folder that is not kdata's, the folder alone."""
    known = {"dataset.json", "manifest.jsonl", *PAGES}
    known |= {relative for entry in dataset.manifest for relative in entry.files}
    known |= {f"tokenizer/{name}" for name in dataset.info.tokenizer_files}
    problems = []
    for path in without_hidden(dataset.path, "*"):
        if path.is_file() or path.is_symlink():
            files = [path]
        elif path.name in FOLDERS:
            files = [file for file in without_hidden(path, "**/*") if file.is_symlink() or not file.is_dir()]
        else:
            problems.append(Problem(f"{path.name}/", STRAY, stray=True))
            continue
        if path.name == "tokenizer" and not dataset.info.tokenizer_files:
            continue  # an older kdata recorded no digests of them
        for kind in KINDS:
            if path.name == kind.folder:
                known |= _known(dataset, kind)
        names = [file.relative_to(dataset.path).as_posix() for file in files]
        problems += [Problem(name, STRAY, stray=True) for name in names if name not in known]
    return problems


def _known(dataset: Dataset, kind: Kind) -> set[str]:
    """The JSON of a kind, and the files that it lists. Parts of one that is not complete are its own."""
    known: set[str] = set()
    for name in dataset.listed(kind):
        known.add(f"{kind.folder}/{name}.json")
        try:
            info, _ = read_listing(dataset.path / kind.folder / f"{name}.json", kind)
        except KdataError:  # `_listed` says so; what it had cannot be known
            info = None
        listed_files = {} if info is None else info.files_of(kind)
        known |= set(listed_files)
        if not listed_files or kind is HIDDEN:
            parts = (kind.part(name, entry.name) for entry in dataset.manifest)
            known |= {f"plans/{name}.parquet"} if kind is PLANS else set(parts)
    return known


def _deep(dataset: Dataset) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    scores = [TokenScore(dataset, name) for name in dataset.listed(SCORES) if has_tokens(dataset, name)]
    with Task("verify rows", dataset.num_tokens, "tokens") as task:
        for number, entry in enumerate(dataset.manifest):
            problems += _deep_shard(dataset, number, entry, seen, scores)
            task.advance(entry.tokens)
    return problems


def _deep_shard(
    dataset: Dataset, number: int, entry: ManifestEntry, seen: set[str], scores: list[TokenScore]
) -> list[Problem]:
    where = f"data/{entry.name}.arrow"
    try:
        sequences = dataset.shard(number)
        index = read_index(dataset.checked_file(entry, "index"), ["id", "num_tokens", "num_target_tokens"])
    except KdataError as error:
        return [Problem(where, str(error))]
    ids, problems = index["id"].to_pylist(), []
    counts_S = np.diff(sequences.offsets)
    payload = {"num_tokens": counts_S, "num_target_tokens": segment_sum(sequences.target_mask, counts_S)}
    for name, numbers_S in payload.items():
        if len(wrong := np.flatnonzero(index[name].to_numpy() != numbers_S)):
            row = int(wrong[0])
            problems.append(Problem(where, f"row {ids[row]!r} has another {name} than its index says"))
    if len(sequences.token_ids) != entry.tokens:
        problems.append(Problem(where, f"holds {len(sequences.token_ids)} tokens, the manifest says {entry.tokens}"))
    kept = int((sequences.target_mask & (sequences.num_kept > 0)).sum())
    if entry.kept_positions not in (None, kept):
        problems.append(Problem(where, f"keeps {kept} target positions, the manifest says {entry.kept_positions}"))
    for row_id in ids:
        if row_id in seen:
            problems.append(Problem(where, f"id {row_id!r} is repeated in the dataset"))
        seen.add(row_id)
    for score in scores:
        try:
            _deep_score(score, number, ids, sequences)
        except CorruptError as error:
            problems.append(Problem(score.relative(number), str(error)))
    return problems


def _deep_score(score: TokenScore, number: int, ids: list[str], sequences: Sequences) -> None:
    """Compare a shard's part of a score with the ids and tokens of its rows, and each mean with its tokens.

    Raises CorruptError where they differ, or a number is not finite.
    """
    counts_S = np.diff(sequences.offsets)
    nll_T = score.nll(number, np.arange(len(ids)), counts_S).astype(np.float64)
    path, table = score.part(number, SCORE_SCHEMA)
    if table["id"].to_pylist() != ids:
        raise damaged(path, "its ids are not those of the shard's rows")
    row_T = np.repeat(np.arange(len(ids)), counts_S)
    first_T = np.zeros(len(nll_T), bool)
    first_T[sequences.offsets[:-1][counts_S > 0]] = True
    wrong = row_T[np.isfinite(nll_T) == first_T]
    if len(wrong):
        raise damaged(path, f"row {ids[wrong[0]]!r} has a value that is not finite, or one at position 0")
    target_T = sequences.target_mask & ~first_T
    rows, nlls = row_T[target_T], nll_T[target_T]
    num_S = np.bincount(rows, minlength=len(ids))
    mean_S, size_S = (np.bincount(rows, v, len(ids)) / np.maximum(num_S, 1) for v in (nlls, np.abs(nlls)))
    stored_S = table["nll"].to_numpy()  # NaN without a target
    rounding_S = 2.0**-10 * size_S + 2.0**-24  # twice what float16 loses
    off = np.flatnonzero((num_S > 0) & ~(np.abs(mean_S - stored_S) <= rounding_S))
    if len(off):
        row = int(off[0])
        raise damaged(path, f"row {ids[row]!r} has the mean NLL {stored_S[row]}, that of its tokens is {mean_S[row]}")
