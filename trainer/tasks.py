"""Tasks of the lm-evaluation-harness (extra `lm-eval`), on a student that is already loaded.

What a task is, downloads and scores is the harness's business: a task of the Hub needs a network or a filled cache, one from
a folder of YAML files that reads local data needs neither. No code of a Hub data set is run.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kdata.errors import ConfigError, DependencyError


class Tasks:
    """Tasks that the harness knows; asked for before anything is measured, so that a wrong name costs nothing.

    Args:
        names: of tasks or groups.
        folder: further tasks, YAML files as the harness reads them; None: those that it brings.
    Raises:
        DependencyError: the harness is not installed.
        ConfigError: it does not know a task.
    """

    def __init__(self, names: list[str], folder: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise DependencyError(
                f"tasks {names} need the lm-evaluation-harness ({error}); pip install 'kdata[lm-eval]', or leave tasks out"
            ) from error
        self.names, self._manager = list(names), TaskManager(include_path=folder)
        unknown = sorted(set(names) - set(self._manager.all_tasks))
        if unknown:
            where = "" if folder is None else f" and {folder} holds none of that name"
            raise ConfigError(
                f"the lm-evaluation-harness knows no task {unknown[0]!r}{where}; `lm-eval ls tasks` lists them"
            )

    def score(
        self, model: PreTrainedModel, tokenizer: Any, *, limit: int | None = None, batch_size: int = 8
    ) -> dict[str, dict[str, float]]:
        """Let the harness score a student.

        Args:
            limit: documents of each task, the first ones; None: all.
            batch_size: requests of one forward pass.
        Returns:
            For each task, groups included: the harness's own names of metrics ("acc,none", "acc_stderr,none") and values.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        student = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(student, tasks=self.names, task_manager=self._manager, limit=limit, log_samples=False)
        return {
            task: {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
            for task, scores in found["results"].items()
        }
