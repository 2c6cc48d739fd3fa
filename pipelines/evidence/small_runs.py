"""Small runs for RegMix and Olmix: the loss of tiny students on held-out text, and the weights of the domains that they read.

RegMix gets RUNS of them. Olmix gets as many in all: first those that weigh all domains but one as RegMix does, then those of
the domain that is added, in which the others keep their ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from kdata.pipelines.evidence.runs import load_runs, run_all
from kdata.selection.tables import REUSED, RegMix
from kdata.trainer.config import ScratchStudent

STUDENT = ScratchStudent(hidden_size=48, num_layers=2, num_heads=2)
SHARE_OF_STEPS = 0.1  # of the students that are compared
SEED = 200  # no other student has it
RUNS, RUNS_FORMER = 16, 10  # of RegMix; of the former weights of Olmix
TABLES = {"regmix": "regmix.parquet", "former": "former.parquet", "olmix": "olmix.parquet"}

Weights = Mapping[str, float]
LossOf = Callable[[Weights], float]


def regmix_table(folder: Path, units: Mapping[str, int], loss_of: LossOf) -> Path:
    """The table of runs for `RegMix`; see `_measure`."""
    return _measure(folder / TABLES["regmix"], {name: {name: 1.0} for name in units}, units, RUNS, loss_of)


def olmix_tables(folder: Path, units: Mapping[str, int], loss_of: LossOf) -> tuple[Path, Path]:
    """The former weights, of all domains but the last by name, and the table of runs for `Olmix` that add it."""
    added = max(units)
    before = {name: units[name] for name in units if name != added}
    runs = _measure(folder / "before.parquet", {name: {name: 1.0} for name in before}, before, RUNS_FORMER, loss_of)
    former, _ = RegMix(runs=str(runs)).fitted(str(runs), before)
    file = folder / TABLES["former"]
    pl.DataFrame({"domain": list(former), "weight": list(former.values())}).write_parquet(file)
    columns = {REUSED: former, added: {added: 1.0}}
    of_columns = {REUSED: sum(before.values()), added: units[added]}
    return file, _measure(folder / TABLES["olmix"], columns, of_columns, RUNS - RUNS_FORMER, loss_of)


def _measure(
    file: Path, columns: Mapping[str, Weights], units: Mapping[str, int], number: int, loss_of: LossOf
) -> Path:
    """Measure the runs that are missing, and write their weights and losses to `file`.

    Args:
        columns: each column that gets a weight, and how it is divided among domains.
        units: what the dataset holds of each column; weights are drawn from a Dirichlet distribution around these shares,
            as wide as the uniform one.
        number: of runs.
        loss_of: trains a tiny student with the weights of domains, and measures it.
    """
    total = sum(units.values())

    def measure(name: str, run: int) -> dict[str, float | None]:
        alpha = [len(columns) * units[column] / total for column in columns]
        drawn = dict(zip(columns, np.random.default_rng(run).dirichlet(alpha).tolist(), strict=True))
        weights: dict[str, float] = {}
        for column, domains in columns.items():
            weights |= {domain: drawn[column] * share for domain, share in domains.items()}
        return {**drawn, "loss": loss_of(weights)}

    name, folder = file.stem, file.with_suffix("")
    run_all(folder, [(name, run) for run in range(number)], measure, {"columns": sorted(columns)})
    pl.DataFrame([dict(figures) for figures in load_runs(folder, [name])[name].values()]).write_parquet(file)
    return file
