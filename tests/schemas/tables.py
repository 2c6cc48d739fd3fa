"""What schemas/ holds beside the column documents: JSON Schemas and the README's tables, made from the code.

`python -m tests.schemas.tables` writes both; test_contracts.py holds the files to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel

from kdata.format.schema import (
    CodecError,
    CodecInfo,
    DatasetInfo,
    FileInfo,
    ManifestEntry,
    MemberInfo,
    SourceInfo,
    TeacherInfo,
    TokenizerInfo,
)
from kdata.pipelines.recipe import Recipe
from kdata.selection.plan import (
    PLAN_SCHEMA,
    POSITIONS_FIELD,
    WEIGHTS_FIELD,
    DomainChoice,
    PlanInfo,
    PositionShare,
    PositionsInfo,
)
from kdata.selection.sidecar import SCORE_SCHEMA, ScoreInfo
from kdata.store.hidden import HiddenInfo
from kdata.store.token_scores import TOKEN_NLL

FOLDER = Path(__file__).resolve().parents[2] / "schemas"
README = FOLDER / "README.md"
JSON_FILES: dict[str, type[BaseModel]] = {
    "dataset": DatasetInfo,
    "manifest": ManifestEntry,
    "plan": PlanInfo,
    "score": ScoreInfo,
    "hidden": HiddenInfo,
    "recipe": Recipe,
}
MODELS = [
    DatasetInfo,
    TeacherInfo,
    MemberInfo,
    TokenizerInfo,
    CodecInfo,
    SourceInfo,
    ManifestEntry,
    FileInfo,
    CodecError,
    ScoreInfo,
    HiddenInfo,
    PlanInfo,
    DomainChoice,
    PositionsInfo,
    PositionShare,
]
# Columns of the manifest view, and of sidecars and plans, whose Arrow schemas carry no words.
WORDS = {
    "id": "Id of the sequence.",
    "nll": "The model's mean negative log-likelihood over the teacher's target positions, nats per token; "
    "null without any.",
    "num_target_tokens": "Positions that the mean is over.",
    "token_nll": "The model's negative log-likelihood of each token, target or not, nats; NaN at position 0.",
    "repeats": "How often it is taken, at least 1.",
    "positions": "Which of its positions count, rising.",
    "weights": "How much each of them counts, above 0; absent where each counts 1.",
    "shard": "Name of the shard.",
    "source": "Source that wrote it.",
    "unit": "Work unit of that source.",
    "rows": "Sequences.",
    "tokens": "Tokens.",
    "target_tokens": "Positions that count as targets.",
    "rejected": "Inputs that were refused.",
    "payload_bytes": "Bytes of its file in data/.",
    "index_bytes": "Bytes of its file in index/.",
    "mean_error_nats": "`mean_nats` of its codec_error.",
    "kl_nats": "`kl_nats` of its codec_error.",
}


def document(name: str) -> dict[str, Any]:
    """One of the column documents of schemas/v1."""
    return json.loads((FOLDER / "v1" / f"{name}.json").read_text("utf-8"))


def json_schema(name: str) -> str:
    """The JSON Schema of one JSON file; further keys are allowed, as a newer minor version may add some."""
    schema = JSON_FILES[name].model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"kdata/v1/{name}.schema.json"}
    return json.dumps({**head, **schema}, indent=2) + "\n"


def version_of(codec: dict[str, Any]) -> str:
    """Version, or versions, of a codec."""
    return f"Version {codec['version']}" if codec["version"] == 1 else f"Versions 1 to {codec['version']}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def columns_table(columns: list[dict[str, Any]]) -> str:
    """A table of documented columns."""
    return table(
        ["column", "type", "null", "what it is"],
        [[f"`{c['name']}`", c["type"], "yes" if c["nullable"] else "", c["doc"]] for c in columns],
    )


def arrow_table(schema: pa.Schema) -> str:
    """A table of an Arrow schema."""
    return table(["column", "type", "what it is"], [[f"`{f.name}`", str(f.type), WORDS[f.name]] for f in schema])


def token_table(name: str) -> str:
    """A table of the columns of `tokens` or `entries`."""
    from kdata.store.token_table import TEXT, schema_of

    rows = [
        [f"`{f.name}`", "string" if f.type == TEXT else str(f.type), f.metadata[b"doc"].decode()]
        for f in schema_of(name)
    ]
    return table(["column", "type", "what it is"], rows)


def type_name(annotation: Any) -> str:
    """A type as JSON sees it."""
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_name(arguments[0])
    if get_origin(annotation) is dict:
        return f"object of {type_name(arguments[1])}"
    if get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if arguments and isinstance(arguments[0], str):
        return " or ".join(f'"{value}"' for value in arguments)
    if arguments:
        return " or ".join(type_name(part) for part in arguments)
    return {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}[annotation.__name__]


def model_table(model: type[BaseModel]) -> str:
    """A table of a model's keys."""
    rows = [[f"`{f.alias or n}`", type_name(f.annotation), f.description or ""] for n, f in model.model_fields.items()]
    return table(["key", "type", "what it is"], rows)


def manifest_view() -> pa.Schema:
    """Columns of the SQL view `manifest`."""
    from types import SimpleNamespace

    from kdata.store.sql import manifest_table

    return manifest_table(SimpleNamespace(manifest=[])).schema  # type: ignore[arg-type]


def tables() -> dict[str, Callable[[], str]]:
    """Every generated table of the README, by the name in its mark."""
    codecs = document("payload")["codecs"]
    generated: dict[str, Callable[[], str]] = {
        "payload": lambda: columns_table(document("payload")["columns"]),
        "index": lambda: columns_table(document("index")["columns"]),
        "rejects": lambda: columns_table(document("rejects")["columns"]),
        "scores": lambda: arrow_table(SCORE_SCHEMA),
        "token_scores": lambda: arrow_table(pa.schema([TOKEN_NLL])),
        "plans": lambda: arrow_table(PLAN_SCHEMA),
        "plan_positions": lambda: arrow_table(pa.schema([POSITIONS_FIELD, WEIGHTS_FIELD])),
        "manifest": lambda: arrow_table(manifest_view()),
        "tokens": lambda: token_table("tokens"),
        "entries": lambda: token_table("entries"),
    }
    coded = codecs["packed"]["coded"]["columns"]
    generated["packed_coded"] = lambda: columns_table(coded)
    for name, spec in codecs.items():
        generated[name] = lambda spec=spec: f"{version_of(spec)}. {spec['doc']}\n\n" + columns_table(spec["columns"])
    for model in MODELS:
        generated[model.__name__] = lambda model=model: model_table(model)
    return generated


MARK = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The README with every marked table made anew."""
    generated = tables()
    return MARK.sub(lambda m: f"<!-- table: {m[1]} -->\n{generated[m[1]]()}\n<!-- end -->", text)


def main() -> None:
    """Write the JSON Schemas and the README's tables."""
    for name in JSON_FILES:
        (FOLDER / "v1" / f"{name}.schema.json").write_text(json_schema(name), "utf-8")
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
