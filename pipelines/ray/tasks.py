"""Functions on the machines of a Ray cluster: texts of hygiene, shards of a selection. The result is that of one machine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pydantic import Field

from kdata.errors import KdataError, StorageError, first_line
from kdata.pipelines.ray.workers import ClusterConfig, connect, load_ray


class RayTasksConfig(ClusterConfig):
    """Tasks on a Ray cluster."""

    cpus_per_task: float = Field(1.0, gt=0, description="CPU cores of one task.")
    tasks: int | None = Field(
        None, ge=1, description="Tasks at a time; null: as many as the cluster has cores for at the start."
    )


class RayTasks:
    """A `kdata.selection.session.Pool` on a Ray cluster, as a context manager that leaves the cluster if it joined it.

    What a task needs (an evaluation set, the dataset) has the same path on every machine, or is at a URL. A task whose
    machine dies is done again elsewhere.

    Raises:
        ConfigError: no cluster can be joined.
        DependencyError: Ray is not installed.
    """

    def __init__(self, config: RayTasksConfig) -> None:
        self._config = config
        self._ray: Any = None

    def __enter__(self) -> RayTasks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ray is not None and self._joined:
            self._ray.shutdown()

    def _start(self) -> None:
        """Join the cluster when there is something to do: what is wrong with the settings is said without one."""
        if self._ray is not None:
            return
        ray = load_ray()
        self._joined = not ray.is_initialized()
        if self._joined:
            connect(ray, self._config.address)
        self._ray = ray
        cpus = self._config.cpus_per_task
        most = self._config.tasks or max(1, int(ray.cluster_resources().get("CPU", 1) / cpus))
        self._under_way = 2 * most  # one waits for each that runs
        self._call = ray.remote(num_cpus=cpus, scheduling_strategy="SPREAD")(_called)

    @property
    def under_way(self) -> int:
        """See `kdata.selection.session.Pool`."""
        self._start()
        return self._under_way

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """See `kdata.selection.session.Pool`. The future raises a KdataError as the function raised it, or StorageError."""
        self._start()
        result: Future[Any] = Future()

        def settle(answer: Future[Any]) -> None:
            error = answer.exception()
            if error is None:
                result.set_result(answer.result())
            else:
                result.set_exception(_own(error))

        self._call.remote(function, *arguments).future().add_done_callback(settle)
        return result


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a task does."""
    return function(*arguments)


def _own(error: BaseException) -> BaseException:
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, KdataError) else error
    if isinstance(error, RayError):
        reason = f"{type(error).__name__}: {first_line(error)}"
        return StorageError(f"a task on the Ray cluster was lost ({reason}); run the same command again")
    return error
