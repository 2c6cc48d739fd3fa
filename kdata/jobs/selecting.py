"""Selection with a model: `kdata.selection.select.select`, and the model that the rule `gap` reads the text with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from kdata.calls import validated
from kdata.config import as_written
from kdata.format.files import require_writable
from kdata.format.keep import KeepConfig
from kdata.jobs.scoring import open_reader
from kdata.selection.plan import Plan
from kdata.selection.position_rules import Gap
from kdata.selection.select import parse_step
from kdata.selection.select import select as select_rows
from kdata.selection.session import Pool
from kdata.selection.step import Step
from kdata.store.open import AnyDataset, opened
from kdata.store.sql import Room
from kdata.teachers.base import Teacher
from kdata.teachers.config import TeacherConfig


def _as_step(value: Any) -> Any:
    return parse_step(as_written(dict(value))) if isinstance(value, Mapping) else value


if TYPE_CHECKING:
    AnyStep = Step
else:  # for `validated`: a mapping with `method` becomes the settings of that method
    AnyStep = Annotated[Step, BeforeValidator(_as_step), Field(examples=[{"method": "random", "share": 0.5}])]


@dataclass(frozen=True)
class _Reader:
    """A `kdata.selection.position_base.TokenReader` over an open model."""

    model: Teacher

    @property
    def recorded(self) -> dict[str, Any]:
        return {"weights_hash": self.model.info.weights_hash}

    def logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [readout.logprob for readout in self.model.read(sequences, KeepConfig(kind="topk", k=1))]


@validated
def select(dataset: AnyDataset, config: AnyStep, room: Room | None = None, *, pool: Pool | None = None) -> Plan:
    """Do one step of selection and save its plan; see `kdata.selection.select.select`, also for the errors.

    Raises:
        MismatchError: also where the model of the rule `gap` has another tokenizer than the dataset.
        ConfigError: also where a sequence is longer than that model's context.
        TeacherError: a log-probability of that model is not finite.
    """
    dataset = opened(dataset)
    if not isinstance(config.positions, Gap):
        return select_rows(dataset, config, room, pool=pool)
    require_writable(dataset.path / "plans" / (config.name or config.method))  # before a model is loaded
    rule = config.positions
    reader = TeacherConfig(model=rule.model, revision=rule.revision, backend=rule.backend)
    with open_reader(dataset, reader) as (model, _):
        return select_rows(dataset, config, room, reader=_Reader(model), pool=pool)
