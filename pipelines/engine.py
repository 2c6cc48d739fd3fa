"""Where a teacher works: in this process, or in actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdata.config import Strict
from kdata.jobs.job import Engine, LocalEngine, devices_of
from kdata.observe.progress import console
from kdata.pipelines.ray.actor import load_both
from kdata.pipelines.ray.engine import RayEngine
from kdata.pipelines.ray.workers import RayConfig
from kdata.store.gguf import is_gguf, model_folder
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import ANY_WORK, Work


class LocalConfig(Strict):
    """One teacher in this process."""

    kind: Literal["local"] = Field("local", description="The local engine.")


EngineConfig = Annotated[LocalConfig | RayConfig, Field(discriminator="kind")]


def is_here(config: LocalConfig | RayConfig) -> bool:
    """True where the teacher is loaded in this process: then the longest sequence is looked up first, to size it."""
    return isinstance(config, LocalConfig)


@contextmanager
def open_engine(
    config: LocalConfig | RayConfig, teacher: TeacherConfig, *, max_k: int, work: Work = ANY_WORK
) -> Iterator[Engine]:
    """Load a teacher where the settings say, and free it at the end.

    Args:
        max_k: largest k that will be asked for.
        work: what the teacher is for, which decides how much memory it takes.
    Raises:
        KdataError: see `load_teacher`, `RayEngine`.
    """
    if isinstance(config, RayConfig):
        with RayEngine(config, teacher, max_k=max_k, loader=partial(load_both, work=work)) as engine:
            yield engine
        return
    if is_gguf(teacher.model):
        with console.status(f"converting {Path(teacher.model).name}; the first time this takes a minute or more"):
            model_folder(teacher.model)
    with console.status(f"loading the teacher ({teacher.backend})"):
        loaded = load_teacher(teacher, max_k=max_k, work=work)
    try:
        tokenizer = load_tokenizer(teacher.model, loaded.info.revision, bos=teacher.bos)
        yield LocalEngine(loaded, tokenizer, devices_of(teacher))
    finally:
        loaded.close()
