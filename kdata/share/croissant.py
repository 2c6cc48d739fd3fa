"""Croissant metadata of a dataset, croissant.json: what search engines for datasets and `mlcroissant` read.

The format: Croissant 1.0 of MLCommons (https://docs.mlcommons.org/croissant/docs/croissant-spec.html), JSON-LD on schema.org.
The record set `index` has every column of the index; the payload (Arrow IPC) is named as files, as no reader of Croissant
opens that format. The file has nothing that depends on the clock: `datePublished`, which the specification asks for, is what
the place of publication knows.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from kdata.format.schema import index_schema
from kdata.observe.text import one_line
from kdata.store.dataset import Dataset

# As the specification's appendix has it; readers compare it.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
ARROW = "application/vnd.apache.arrow.file"
PARQUET = "application/x-parquet"
MOST_FILES = 1_000  # files that are named one by one, with their digests; more are a pattern


def croissant_page(
    dataset: Dataset, title: str, licenses: list[str], url: str | None, languages: tuple[str, ...]
) -> bytes:
    """croissant.json as UTF-8 bytes; the same for the same dataset and arguments.

    Args:
        licenses: ids of the Hub.
        url: of the dataset; None: relative to the file.
    """
    info = dataset.info
    page: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": one_line(title),
        "description": (
            f"What the language model {one_line(info.teacher.model)} believed at each token of {dataset.num_rows:,} texts "
            f"({dataset.num_tokens:,} tokens). Format: kdata {info.format_version}, codec {info.codec.id} "
            f"{info.codec.version}, kind {info.codec.kind}."
        ),
        "version": f"1.0.0+{dataset.content_digest[:12]}",
        "keywords": ["logits", "distillation", "kdata"],
        "isLiveDataset": False,
        "distribution": _files(dataset),
        "recordSet": [_index()],
    }
    if url is not None:
        page["url"] = url
    if licenses:
        page["license"] = licenses[0] if len(licenses) == 1 else licenses
    if languages:
        page["inLanguage"] = list(languages)
    return (json.dumps(page, ensure_ascii=False, indent=2) + "\n").encode()


def _files(dataset: Dataset) -> list[dict[str, Any]]:
    """The files of index and payload with their digests, and the set of the index's; for many files only patterns."""
    few = [
        {
            "@type": "cr:FileObject",
            "@id": path,
            "name": path,
            "contentUrl": path,
            "contentSize": f"{about.bytes} B",
            "encodingFormat": PARQUET if path.endswith(".parquet") else ARROW,
            "sha256": about.sha256,
        }
        for entry in dataset.manifest
        for path, about in sorted(entry.files.items())
        if not path.startswith("rejects/")
    ]
    sets = [
        {"@type": "cr:FileSet", "@id": "index-files", "name": "index-files", "description": "One row for each text.",
         "encodingFormat": PARQUET, "includes": "index/*.parquet"},
        {"@type": "cr:FileSet", "@id": "payload-files", "name": "payload-files",
         "description": "Tokens, and the teacher's numbers as they are stored; the same rows in the same order.",
         "encodingFormat": ARROW, "includes": "data/*.arrow"},
    ]  # fmt: skip
    return (few if len(few) <= MOST_FILES else []) + sets


def _index() -> dict[str, Any]:
    """The record set of the index's columns."""
    return {
        "@type": "cr:RecordSet",
        "@id": "index",
        "name": "index",
        "description": "One row for each text: what it is, and what the teacher made of it.",
        "key": {"@id": "index/id"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"index/{column.name}",
                "name": column.name,
                "description": column.metadata[b"doc"].decode(),
                "dataType": _type(column.type),
                "source": {"fileSet": {"@id": "index-files"}, "extract": {"column": column.name}},
            }
            for column in index_schema()
        ],
    }


def _type(kind: pa.DataType) -> str:
    if pa.types.is_string(kind):
        return "sc:Text"
    return "sc:Integer" if pa.types.is_integer(kind) else "sc:Float"
