"""kdata: logit datasets. What a teacher believed at every token, kept on disk to query, share and train from.

    data = kdata.open("runs/quickstart/dataset")    a folder, a URL, or hf://OWNER/NAME
    data[0]                                         one sequence with the teacher's numbers
    data.sql("select domain, avg(nll) from rows group by 1")
    kdata.head(data, "first", 10)                   functions take a dataset, or where it is

This is the public API. `import kdata` itself is quick: it loads no numpy, pyarrow, DuckDB, torch or vLLM. Each name below is
imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdata.check.repair import repair
    from kdata.check.verify import verify
    from kdata.config import VERSION as __version__
    from kdata.corpus.corpus import CorpusConfig
    from kdata.errors import (
        ConfigError,
        CorruptError,
        DataError,
        DependencyError,
        DistributionError,
        FormatError,
        KdataError,
        MismatchError,
        MissingError,
        OutOfRangeError,
        QueryError,
        ShapeError,
        StorageError,
        TeacherError,
        TooLongError,
        TrainingError,
        UnreachableError,
    )
    from kdata.format.sequences import Sequences
    from kdata.jobs.combine import CombineConfig, combine
    from kdata.jobs.reading import CaptureConfig, capture
    from kdata.jobs.retokenize import RetokenizeConfig, retokenize
    from kdata.jobs.scoring import ScoreConfig, score
    from kdata.jobs.selecting import select
    from kdata.jobs.soften import SoftenConfig, soften
    from kdata.jobs.writing import GenerateConfig, generate
    from kdata.selection.plan import Plan, make_plan
    from kdata.share.arrange import head, merge, split
    from kdata.share.diff import diff
    from kdata.share.pull import pull
    from kdata.share.push import push
    from kdata.store.dataset import Dataset
    from kdata.store.open import open_dataset as open
    from kdata.store.row import Row
    from kdata.teachers.config import SamplingConfig, TeacherConfig

__all__ = [
    "CaptureConfig",
    "CombineConfig",
    "ConfigError",
    "CorpusConfig",
    "CorruptError",
    "DataError",
    "Dataset",
    "DependencyError",
    "DistributionError",
    "FormatError",
    "GenerateConfig",
    "KdataError",
    "MismatchError",
    "MissingError",
    "OutOfRangeError",
    "Plan",
    "QueryError",
    "RetokenizeConfig",
    "Row",
    "SamplingConfig",
    "ScoreConfig",
    "Sequences",
    "ShapeError",
    "SoftenConfig",
    "StorageError",
    "TeacherConfig",
    "TeacherError",
    "TooLongError",
    "TrainingError",
    "UnreachableError",
    "__version__",
    "capture",
    "combine",
    "diff",
    "generate",
    "head",
    "make_plan",
    "merge",
    "open",
    "pull",
    "push",
    "repair",
    "retokenize",
    "score",
    "select",
    "soften",
    "split",
    "verify",
]

# Module of each public name, and its name there where that is another one.
_MODULES = {
    "CaptureConfig": "kdata.jobs.reading",
    "CombineConfig": "kdata.jobs.combine",
    "CorpusConfig": "kdata.corpus.corpus",
    "Dataset": "kdata.store.dataset",
    "GenerateConfig": "kdata.jobs.writing",
    "Plan": "kdata.selection.plan",
    "RetokenizeConfig": "kdata.jobs.retokenize",
    "Row": "kdata.store.row",
    "SamplingConfig": "kdata.teachers.config",
    "ScoreConfig": "kdata.jobs.scoring",
    "Sequences": "kdata.format.sequences",
    "SoftenConfig": "kdata.jobs.soften",
    "TeacherConfig": "kdata.teachers.config",
    "__version__": "kdata.config",
    "capture": "kdata.jobs.reading",
    "combine": "kdata.jobs.combine",
    "diff": "kdata.share.diff",
    "generate": "kdata.jobs.writing",
    "head": "kdata.share.arrange",
    "make_plan": "kdata.selection.plan",
    "merge": "kdata.share.arrange",
    "open": "kdata.store.open",
    "pull": "kdata.share.pull",
    "push": "kdata.share.push",
    "repair": "kdata.check.repair",
    "retokenize": "kdata.jobs.retokenize",
    "score": "kdata.jobs.scoring",
    "select": "kdata.jobs.selecting",
    "soften": "kdata.jobs.soften",
    "split": "kdata.share.arrange",
    "verify": "kdata.check.verify",
    **{name: "kdata.errors" for name in __all__ if name.endswith("Error")},
}
_RENAMED = {"__version__": "VERSION", "open": "open_dataset"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kdata' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_MODULES[name]), _RENAMED.get(name, name))
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
