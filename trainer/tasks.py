"""Tasks of the lm-evaluation-harness (extra `lm-eval`), on a student that is already loaded.

What a task is, downloads and scores is the harness's business: a task of the Hub needs a network or a filled cache, one from
a folder of YAML files that reads local data needs neither. No code of a Hub data set is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kdata.errors import ConfigError, DependencyError


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Let the harness score a student.

    Args:
        tasks: names of tasks or groups.
        folder: further tasks, YAML files as the harness reads them; None: those that it brings.
        limit: documents of each task, the first ones; None: all.
        batch_size: requests of one forward pass.
    Returns:
        For each task, groups included: the harness's own names of metrics ("acc,none", "acc_stderr,none") and their values.
    Raises:
        DependencyError: the harness is not installed.
        ConfigError: it does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DependencyError(
            f"tasks {tasks} need the lm-evaluation-harness ({error}); pip install 'kdata[lm-eval]', or leave tasks out"
        ) from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        where = "" if folder is None else f" and {folder} holds none of that name"
        raise ConfigError(
            f"the lm-evaluation-harness knows no task {unknown[0]!r}{where}; `lm-eval ls tasks` lists them"
        )
    student = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(student, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    return {
        task: {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }
