"""Where the rows of a dataset come from: a chain of commands, back to the corpus and the commit of the teacher.

All of it is in dataset.json, where a digest guards it: the command of a source is its `kind`, `settings` are what it was
called with, `made_by` in them are those of the rows that it was made from, and `inputs` name the datasets, with the commit on
the Hub where they were opened there. A file of its own would have to be kept in step with that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from kdata.format.schema import DatasetInfo, InputInfo

FROM_DATASETS = {"split", "reread", "combine", "retokenize", "soften"}
NOT_SHOWN = {"made_by", "of", "former"}
DIGEST = re.compile("[0-9a-f]{64}")


def provenance(info: DatasetInfo) -> dict[str, Any]:
    """The chain of each source by name: a step has command, teacher (of one that a teacher worked in), settings, inputs
    (datasets: digest, address, commit), and before: the step that made its rows; null at the beginning."""
    return {
        name: _step(source.kind, source.settings, source.inputs, _teacher(info))
        for name, source in info.sources.items()
    }


def _teacher(info: DatasetInfo) -> dict[str, Any]:
    about = info.teacher
    members = [{"model": m.teacher.model, "revision": m.teacher.revision} for m in about.members or []]
    return {
        "model": about.model,
        "revision": about.revision,
        "weights_hash": about.weights_hash,
        **({"members": members} if members else {}),
    }


def _step(
    kind: str, settings: dict[str, Any], inputs: list[InputInfo], teacher: dict[str, Any] | None
) -> dict[str, Any]:
    before = settings.get("made_by") if kind in FROM_DATASETS else None
    earlier = inputs[0] if inputs else None
    return {
        "command": kind,
        "teacher": teacher,
        # `kind` in `made_by` is the command's name, or what is kept, which is a setting.
        "settings": {k: v for k, v in settings.items() if k not in NOT_SHOWN and (k, v) != ("kind", kind)},
        "inputs": [{"digest": i.digest, "address": i.address, "commit": i.commit} for i in inputs] or _of(settings),
        "before": None
        if not isinstance(before, dict)
        else _step(
            _command_of(before) if earlier is None else earlier.kind,
            before,
            [] if earlier is None else earlier.inputs,
            None if earlier is None else _earlier_teacher(earlier),
        ),
    }


def _earlier_teacher(earlier: InputInfo) -> dict[str, Any]:
    revision, digest = earlier.teacher_revision, earlier.teacher_weights_hash
    return {"model": earlier.teacher, "revision": revision, "weights_hash": digest}


def _command_of(settings: dict[str, Any]) -> str:
    """The command of settings in `made_by`, where no input names it: `kind` there may be that of what is kept."""
    kind = str(settings.get("kind"))
    if kind in FROM_DATASETS | {"capture", "generate", "import"}:
        return kind
    return "capture" if "corpus" in settings else "generate" if "prompts" in settings else "reread"


def _of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The digests of inputs of a dataset that an older kdata wrote."""
    of = settings.get("of")
    several = of if isinstance(of, list) else [] if of is None else [of]
    digests = [one.get("fingerprint") if isinstance(one, dict) else one for one in several]
    return [{"digest": digest, "address": None, "commit": None} for digest in digests]


def provenance_lines(info: DatasetInfo) -> list[str]:
    """The same for a person, the last command first, a setting a line; what is not set is left out."""
    lines = []
    for name, step in provenance(info).items():
        lines.append(f"{name}:")
        depth = 1
        while step is not None:
            lines += [f"{'  ' * depth}{line}" for line in _lines_of(step)]
            step, depth = step["before"], depth + 1
    return lines


def _lines_of(step: dict[str, Any]) -> list[str]:
    teacher, lines = step["teacher"], []
    by = ""
    if teacher is not None:
        version = teacher["revision"] or (teacher.get("weights_hash") or "")[:12] or "unknown revision"
        by = f", teacher {teacher['model']} @ {version}"
        by += "".join(f", {m['model']} @ {m['revision'] or 'local'}" for m in teacher.get("members", []))
    lines.append(f"kdata {step['command']}{by}")
    for one in step["inputs"]:
        place = (
            "" if one["address"] is None else f" {one['address']}" + (f" at {one['commit']}" if one["commit"] else "")
        )
        lines.append(f"  of dataset {str(one['digest'])[:12]}{place}")
    return lines + [f"  {key}={shown(value)}" for key, value in flat(step["settings"]) if value not in (None, {}, [])]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings, with its dotted key. An empty mapping is a value."""
    if isinstance(value, dict) and value:
        for key in value:
            yield from flat(value[key], f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def shown(value: Any) -> str:
    """A setting for a person: text without quotes, of a digest its beginning, all else as JSON."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value[:12] if DIGEST.fullmatch(value) else value
