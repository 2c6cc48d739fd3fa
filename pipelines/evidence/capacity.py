"""Which size of student, and does a small student learn more from a smaller teacher (the capacity gap)?

Students of two sizes from random weights learn from the text alone, from what the teacher believed, and from what a smaller
model, the reference, believed of the same text. Runs of one seed see the same batches, and those of one size and seed begin
with the same weights. All are measured by their NLL on the same held-out text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from kdata.config import Strict
from kdata.format.keep import KeepConfig
from kdata.pipelines.evidence.data import TEACHER_FILE, DataConfig, EvidenceData
from kdata.pipelines.evidence.figures import text_of, write_results
from kdata.pipelines.evidence.runs import Figures, by_name
from kdata.pipelines.evidence.students import train_and_measure
from kdata.pipelines.evidence.summary import Estimate, relative_difference, summarise
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.objective_config import ObjectiveConfig

SOURCES = ("text alone", "teacher", "reference")
SIZES = {"narrow": (48, 2, 3), "wide": (128, 4, 4)}  # width, layers, heads


@dataclass(frozen=True)
class Setting:
    """One size of `SIZES`, and which of `SOURCES` it learns from."""

    size: str
    source: str

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.size}: {self.source}"

    def describe(self) -> dict[str, Any]:
        """Its content, as JSON values."""
        return {"size": self.size, "source": self.source}


SETTINGS = tuple(Setting(size, source) for size in SIZES for source in SOURCES)


class CapacityConfig(Strict):
    """Settings that all students share."""

    data: DataConfig = Field(description="Text and teacher.")
    reference: str = Field(description="Folder of a smaller model with the teacher's tokenizer.")
    steps: int = Field(100, ge=1, description="Number of optimizer steps.")
    batch_tokens: int = Field(1024, ge=2, description="Token positions of one step; padding counts.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear rise to the peak; 0: none.")

    def identity(self) -> dict[str, Any]:
        """The settings that the figures depend on; of the reference, the folder's name alone."""
        settings = self.model_dump(mode="json", exclude={"data": {"teacher", "corpus"}})
        return {**settings, "reference": Path(self.reference).name}


class Capacity:
    """The comparison: `measure` trains one setting with one seed and measures the student."""

    def __init__(self, config: CapacityConfig, folder: Path) -> None:
        self.config = config
        smaller = config.data.model_copy(update={"teacher": config.reference})
        self._teacher = EvidenceData(config.data, folder)
        self._reference = EvidenceData(smaller, folder / "reference")

    def measure(self, key: str, seed: int) -> Figures:
        """Train and measure one student; `teacher_params` of the model that it learned from, None: of the text alone."""
        setting, c = find(key), self.config
        width, layers, heads = SIZES[setting.size]
        read = self._reference if setting.source == "reference" else self._teacher
        dataset = read.train(KeepConfig())
        config = TrainConfig(
            label=key,
            student=ScratchStudent(hidden_size=width, num_layers=layers, num_heads=heads),
            objective=ObjectiveConfig(
                weights={"cross_entropy" if setting.source == "text alone" else "forward_kl": 1.0}
            ),
            steps=c.steps,
            batch_tokens=c.batch_tokens,
            context_tokens=c.data.context_tokens,
            seed=seed,
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            precision="fp32",
            data_order="seed",
            checkpoint_every_steps=0,
        )
        figures = train_and_measure(config, dataset, self._teacher.heldout)
        about = json.loads((read.folder / TEACHER_FILE).read_text(encoding="utf-8"))
        return {**figures, "teacher_params": None if setting.source == "text alone" else about["teacher_params"]}


def write_report(out: Path, by_setting: Mapping[str, Mapping[int, Figures]]) -> str:
    """Write results.json and table.md of the runs that are measured; return the table."""
    means = {name: summarise(seeds) for name, seeds in by_setting.items()}
    against = {source: _against(by_setting, source) for source in SOURCES[:2]}
    differences = {f"nll_against_{source.replace(' ', '_')}": by_name for source, by_name in against.items()}
    write_results(out, by_setting, means, differences, lambda name: find(name).describe())
    lines = [
        "| student | learns from | NLL | against the text alone | against the teacher's | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, estimates in means.items():
        setting = find(name)
        size = f"{setting.size}, {estimates['params'].mean / 1e6:.2f}M"
        who = f", {estimates['teacher_params'].mean / 1e6:.1f}M" if "teacher_params" in estimates else ""
        gaps = [
            "-" if source == setting.source else text_of(against[source][name], 2, 100, "%", sign="+")
            for source in against
        ]
        cells = [size, setting.source + who, text_of(estimates["nll"], 3), *gaps, str(estimates["nll"].count)]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    return table


def _against(by_setting: Mapping[str, Mapping[int, Figures]], source: str) -> dict[str, Estimate | None]:
    """Relative difference of each setting's NLL to that of its size that learned from this source, in pairs of a seed."""
    return {
        name: relative_difference(seeds, by_setting.get(Setting(find(name).size, source).key, {}), "nll")
        for name, seeds in by_setting.items()
    }


def find(key: str) -> Setting:
    """A setting by its name. Raises ConfigError if there is none."""
    return by_name({s.key: s for s in SETTINGS}, key)


def runs(seeds: int) -> list[tuple[str, int]]:
    """(setting, seed) of every run."""
    return [(s.key, seed) for seed in range(seeds) for s in SETTINGS]
