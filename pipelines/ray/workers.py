"""The driver's side of the actors: join a cluster, start actors, learn that they are ready or dead, and end them."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdata.config import Strict
from kdata.errors import (
    ConfigError,
    DependencyError,
    KdataError,
    MismatchError,
    TeacherError,
    first_line,
    settings_difference,
)
from kdata.observe.progress import console
from kdata.pipelines.ray.actor import ActorFacts, Loader, TeacherActor
from kdata.teachers.config import TeacherConfig

POLL_SEC = 0.5  # longest sleep of the driver, so that it notices what depends on time alone
CLIENT = "ray://"


class ClusterConfig(Strict):
    """Which Ray cluster."""

    kind: Literal["ray"] = Field("ray", description="The Ray engine.")
    address: str | None = Field(
        None,
        description="HOST:PORT of the cluster's head; auto: the cluster that this machine is in; local: Ray is started here, "
        "on this machine alone; null: RAY_ADDRESS, else as auto, else as local.",
    )

    @field_validator("address")
    @classmethod
    def _no_client(cls, address: str | None) -> str | None:
        if address is not None and address.startswith(CLIENT):
            raise ValueError("the driver must run on a machine of the cluster; use HOST:PORT or auto there")
        return address


class RayConfig(ClusterConfig):
    """Teachers on a Ray cluster."""

    min_teachers: int = Field(1, ge=1, description="Actors with a teacher each that are started at once.")
    max_teachers: int | None = Field(
        None,
        ge=1,
        description="So many are started while units wait (a cluster that scales by itself adds machines for them); null: no "
        "more than min_teachers.",
    )
    gpus_per_teacher: float | None = Field(
        None,
        ge=0,
        description="GPUs of one actor, below 1 to share one; null: as many as teacher.tensor_parallel where the cluster has "
        "GPUs at the start (none for vllm-server), otherwise none.",
    )
    cpus_per_teacher: float = Field(
        1.0, gt=0, description="CPU cores of one actor; also the threads of its arithmetic."
    )
    resources: dict[str, float] = Field(
        {}, description="Further Ray resources of one actor, to choose machines: {accelerator_type:H100: 0.001}."
    )
    units_per_teacher: int = Field(
        2, ge=1, description="Units that an actor holds at a time: one at work, the others written or waiting."
    )
    slow_factor: float | None = Field(
        3.0,
        gt=1,
        description="A unit that takes so many times the median, and over 10 s, is done a second time once an actor is idle; "
        "null: never.",
    )
    max_deaths: int = Field(
        3,
        ge=1,
        description="So many actors may die at one unit, or at loading in a row, before the run ends with an error.",
    )
    start_timeout_sec: float = Field(
        1800.0,
        gt=0,
        description="Longest wait, in seconds, while not one teacher is ready; covers a machine being added.",
    )

    @model_validator(mode="after")
    def _numbers(self) -> RayConfig:
        if self.max_teachers is not None and self.max_teachers < self.min_teachers:
            raise ValueError(f"max_teachers {self.max_teachers} is below min_teachers {self.min_teachers}; raise it")
        return self

    @property
    def most(self) -> int:
        """Actors at most."""
        return self.max_teachers or self.min_teachers


class ActorLost(Exception):
    """An actor or its machine died; internal to the engine."""


@dataclass(eq=False)
class Worker:
    """An actor as the driver sees it; `loading` is the future of its facts, which comes once its teacher is loaded."""

    actor: Any
    loading: Any
    ready: bool = False


class Workers:
    """The actors of an engine, as a context manager that ends all of them. Arguments and errors: see `RayEngine`."""

    def __init__(self, config: RayConfig, teacher: TeacherConfig, max_k: int, loader: Loader) -> None:
        self.config, self._teacher = config, teacher
        self._arguments = (loader, teacher, max_k)
        self.all: list[Worker] = []
        self.facts: ActorFacts | None = None
        self._failed_starts = 0
        self._none_ready_since = time.monotonic()

    def __enter__(self) -> Workers:
        self.ray = load_ray()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._joined = not self.ray.is_initialized()
            if self._joined:
                connect(self.ray, self.config.address)
            self._none_ready_since = time.monotonic()
            with console.status("starting teachers on the Ray cluster"):
                while not self.ready:
                    self.start(self.config.min_teachers)
                    self.settle(self.wait([]))
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every actor, and leave the cluster if this object joined it."""
        for worker in list(self.all):
            self.let_go(worker)
        if self._joined:
            self.ray.shutdown()

    @property
    def ready(self) -> list[Worker]:
        """The actors whose teacher is loaded."""
        return [worker for worker in self.all if worker.ready]

    def start(self, number: int) -> None:
        """Start actors until there are `number` of them, or as many as the settings allow."""
        config = self.config
        while len(self.all) < min(number, config.most):
            gpus = config.gpus_per_teacher
            if gpus is None:
                needed = self._teacher.backend != "vllm-server" and self.ray.cluster_resources().get("GPU")
                gpus = self._teacher.tensor_parallel if needed else 0
            options = {
                "num_cpus": config.cpus_per_teacher,
                "num_gpus": gpus,
                "resources": config.resources,
                "max_concurrency": config.units_per_teacher + 3,  # room for `facts`, `drop` and `tokens`
                "max_restarts": 0,  # the driver counts deaths and starts new actors itself
                "scheduling_strategy": "SPREAD",
            }
            actor = self.ray.remote(TeacherActor).options(**options).remote(*self._arguments)
            self.all.append(Worker(actor, actor.facts.remote()))

    def let_go(self, worker: Worker) -> None:
        """End an actor's process."""
        self.ray.kill(worker.actor)
        self.all.remove(worker)

    def wait(self, answers: list[Any]) -> Any:
        """The first future that is ready, of these and of the actors that load; None where none is after POLL_SEC.

        Raises TeacherError where no teacher was ready for `start_timeout_sec`.
        """
        if self.ready:
            self._none_ready_since = time.monotonic()
        elif time.monotonic() - self._none_ready_since > self.config.start_timeout_sec:
            raise TeacherError(self._why_none_is_ready())
        pending = [*answers, *(worker.loading for worker in self.all if not worker.ready)]
        ready, _ = self.ray.wait(pending, num_returns=1, timeout=POLL_SEC)
        return ready[0] if ready else None

    def _why_none_is_ready(self) -> str:
        config = self.config
        has = {name: self.ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU", *config.resources)}
        asked = config.model_dump(include={"gpus_per_teacher", "cpus_per_teacher", "resources"})
        return (
            f"no teacher was ready within start_timeout_sec={config.start_timeout_sec:g} s. One actor asks for {asked} "
            f"of one machine, the cluster has {has}. Ask for less, add machines, or wait longer."
        )

    def settle(self, answer: Any) -> None:
        """Mark an actor as ready, or remove it where it died while it loaded; nothing where the future is another one.

        Raises:
            TeacherError: too many actors in a row died while they loaded.
            MismatchError: its teacher differs from that of the first actor.
            KdataError: as loading raised it.
        """
        worker = next((w for w in self.all if not w.ready and w.loading == answer), None)
        if worker is None:
            return
        try:
            facts = self.get(answer)
        except ActorLost as error:
            self.let_go(worker)
            self._failed_starts += 1
            if self._failed_starts >= self.config.max_deaths * self.config.most:
                raise TeacherError(
                    f"{self._failed_starts} actors in a row died while they loaded the teacher; the last: {error}. See "
                    "Ray's log of the actor on that machine; too little memory is the usual cause"
                ) from None
            return
        first = self.facts = self.facts or facts
        difference = settings_difference(first.identity(), facts.identity())
        if difference:
            raise MismatchError(
                f"the machines {first.machine} and {facts.machine} do not have the same teacher (first -> second):\n"
                f"{difference}\nGive every machine the same model, kdata and engine."
            )
        worker.ready, self._failed_starts = True, 0

    def get(self, answer: Any) -> Any:
        """The value of a future. Raises a KdataError as it was raised in the actor, ActorLost where the actor died."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self.ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, KdataError):
                raise error.cause from None
            raise
        except RayError as error:
            raise ActorLost(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def load_ray() -> Any:
    """Ray, with its usage statistics switched off. Raises DependencyError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise DependencyError("the Ray engine needs Ray: pip install 'kdata[ray]'") from error
    return ray


def connect(ray: Any, address: str | None) -> None:
    """Join a cluster, or start one. Raises ConfigError where there is none at the address."""
    place = address or os.environ.get("RAY_ADDRESS") or ""
    try:
        if place.startswith(CLIENT):
            raise ValueError("the driver must run on a machine of the cluster")
        host, _, port = place.rpartition(":")
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster can be joined at {place or 'this machine'}: {first_line(error)}; start one with "
            "`ray start --head` and name its HOST:PORT"
        ) from error
