"""Tasks of the lm-evaluation-harness (extra `lm-eval`), on a student that is already loaded.

The harness defines the tasks, downloads their data and computes the scores. A task from the Hub needs a network or a filled
cache; a task from a folder of YAML files that reads local data needs neither. No code from a Hub dataset is run.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kdata.errors import ConfigError, DependencyError


class Tasks:
    """Tasks of the harness, looked up before anything is measured, so that a wrong name costs no time.

    Args:
        names: names of tasks or groups.
        folder: folder with further tasks, YAML files in the harness's format; None: only those of the harness.
    Raises:
        DependencyError: the harness is not installed.
        ConfigError: the harness has no task of this name.
    """

    def __init__(self, names: list[str], folder: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise DependencyError(
                f"tasks {names} need the lm-evaluation-harness ({error}); pip install 'kdata[lm-eval]', or remove tasks"
            ) from error
        self.names, self._manager = list(names), TaskManager(include_path=folder)
        unknown = sorted(set(names) - set(self._manager.all_tasks))
        if unknown:
            where = "" if folder is None else f", nor does {folder}"
            raise ConfigError(
                f"the lm-evaluation-harness has no task {unknown[0]!r}{where}; `lm-eval ls tasks` lists them"
            )

    def score(
        self, model: PreTrainedModel, tokenizer: Any, *, limit: int | None = None, batch_size: int = 8
    ) -> dict[str, dict[str, float]]:
        """Score a student with the harness.

        Args:
            limit: number of documents per task, the first ones; None: all.
            batch_size: requests per forward pass.
        Returns:
            For each task and group, its metrics by the harness's names ("acc,none", "acc_stderr,none").
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        student = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = simple_evaluate(student, tasks=self.names, task_manager=self._manager, limit=limit, log_samples=False)
        return {
            task: {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
            for task, scores in results["results"].items()
        }
