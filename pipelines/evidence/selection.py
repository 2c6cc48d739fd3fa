"""Questions 4 and 5: do plans and mixtures help? Each is compared with its baseline, on equal terms.

`selection` trains students on the part that MiniPLM's difference sampling selected, on a random part of the same size, and on
everything. `mixture` trains students whose documents are drawn with fixed domain weights, or with DDK's, which follow the
student. All steps are kdata's own: capture, sidecar, `select`, `train` and `evaluate`. Students of a seed have the same
initial weights, and each sees as many tokens as the others, except in settings that say otherwise.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from filelock import FileLock
from pydantic import Field

import kdata
from kdata.config import Strict
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import MismatchError, settings_difference
from kdata.format.keep import KeepConfig
from kdata.jobs.reading import CaptureConfig, capture_with
from kdata.jobs.scoring import ScoreConfig, score
from kdata.pipelines.evidence.data import HELDOUT_KEEP, Part, split
from kdata.pipelines.evidence.runs import Figures, by_name
from kdata.pipelines.evidence.students import bits_per_byte
from kdata.selection.plan import Plan
from kdata.selection.ranked import Difference, Random
from kdata.selection.select import select
from kdata.selection.step import Step
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.sizing import Work
from kdata.trainer.config import ScratchStudent, StudentConfig, TrainConfig
from kdata.trainer.domain_weights import DDKMixture, FixedMixture, MixtureConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.train import train

Question = Literal["selection", "mixture"]
Tokens = Mapping[str, int]  # of each domain
DISTIL, PLAIN = {"forward_kl": 1.0}, {"cross_entropy": 1.0}


@dataclass(frozen=True)
class Setting:
    """One way to choose data.

    family: settings that are compared with each other. step: the method that selects; None: the whole dataset. mixture:
    builds the trainer's domain weights from the tokens of each domain; None: none. times: factor on the number of steps.
    """

    name: str
    family: str
    step: Step | None = None
    mixture: Callable[[Tokens, SelectionConfig], MixtureConfig] | None = None
    objective: Mapping[str, float] = field(default_factory=lambda: DISTIL)
    times: int = 1


def _fixed(power: float) -> Callable[[Tokens, SelectionConfig], MixtureConfig]:
    """Weights proportional to the domain's tokens to a power: 0 uniform, 1 proportional, 1/2 temperature 2."""

    def mixture(tokens: Tokens, config: SelectionConfig) -> MixtureConfig:
        return FixedMixture(weights={d: n**power for d, n in tokens.items()}, every_steps=config.period_steps)

    return mixture


def _ddk(alpha: float) -> Callable[[Tokens, SelectionConfig], MixtureConfig]:
    return lambda tokens, config: DDKMixture(alpha=alpha, every_steps=config.period_steps)


HALF: dict[str, Any] = {"share": 0.5, "count_by": "tokens"}
RANDOM, BEST = Random(name="half", **HALF), Difference(**HALF)
EACH = Difference(name="each", by_domain=True, **HALF)

SETTINGS: dict[Question, tuple[Setting, ...]] = {
    "selection": (
        Setting("random half", "distillation", RANDOM),
        Setting("difference, half", "distillation", BEST),
        Setting("difference, half of each domain", "distillation", EACH),
        Setting("whole corpus, same compute", "distillation"),
        Setting("whole corpus, twice the compute", "distillation", times=2),
        Setting("random half", "cross-entropy", RANDOM, objective=PLAIN),
        Setting("difference, half", "cross-entropy", BEST, objective=PLAIN),
        Setting("whole corpus, same compute", "cross-entropy", objective=PLAIN),
    ),
    "mixture": (
        Setting("uniform", "mixture", mixture=_fixed(0.0)),
        Setting("proportional", "mixture", mixture=_fixed(1.0)),
        Setting("static (square root of tokens)", "mixture", mixture=_fixed(0.5)),
        Setting("DDK", "mixture", mixture=_ddk(0.5)),
        Setting("DDK, less smoothed (alpha 0.9)", "mixture", mixture=_ddk(0.9)),
    ),
}


class SelectionConfig(Strict):
    """Settings that all students share."""

    teacher: str = Field(description="Folder of a model in Hugging Face format.")
    reference: str = Field(
        description="Folder of a smaller model with the same tokenizer: the reference of difference sampling."
    )
    corpus: str = Field(description="Parquet file with id, domain and text; domains keep their shares.")
    backend: Literal["vllm", "transformers"] = Field("transformers", description="Software that runs the teacher.")
    train_tokens: int = Field(1_600_000, ge=1, description="Tokens to select from.")
    heldout_tokens: int = Field(48_000, ge=1, description="Tokens to measure on, the same number of each domain.")
    validation_tokens: int = Field(
        24_000, ge=1, description="Tokens that DDK measures on, the same number of each domain."
    )
    context_tokens: int = Field(256, ge=2, description="Longest sequence; longer texts are split into several.")
    student: StudentConfig = Field(
        default_factory=lambda: ScratchStudent(hidden_size=96, num_layers=3, num_heads=3),
        description="The model to train.",
    )
    steps: int = Field(480, ge=1, description="Number of optimizer steps; with the defaults no document is read twice.")
    batch_tokens: int = Field(1024, ge=2, description="Token positions of one step; padding counts.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(48, ge=0, description="Steps of linear rise to the peak; 0: none.")
    period_steps: int = Field(48, ge=1, description="Steps between two updates of domain weights.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the student's matrix products; bf16 needs a processor that multiplies it."
    )

    def identity(self) -> dict[str, Any]:
        """The settings that the figures depend on; of models and corpus, the last part of the path alone."""
        settings = {**self.model_dump(mode="json", exclude={"backend"}), **self.data_identity()}
        if not isinstance(self.student, ScratchStudent):
            settings["student"]["model"] = Path(self.student.model).name
        return settings

    def data_identity(self) -> dict[str, Any]:
        """The part of `identity` that the data depends on."""
        sizes = ("train_tokens", "heldout_tokens", "validation_tokens", "context_tokens")
        return {
            **{name: Path(getattr(self, name)).name for name in ("teacher", "reference", "corpus")},
            **{name: getattr(self, name) for name in sizes},
        }


class Selection:
    """The comparison: `measure` trains one setting with one seed and measures the student.

    The data is built in `folder` when it is first used; several processes may use one folder.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("heldout", "validation", "train")

    def __init__(self, config: SelectionConfig, question: Question, folder: Path) -> None:
        self.config, self.question, self.folder = config, question, folder

    @cached_property
    def _datasets(self) -> dict[str, kdata.Dataset]:
        """train, validation and heldout as the teacher reads them; train with the scores of the reference."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "data.json"
        with FileLock(self.folder / "data.lock"):
            if not record.exists():
                self._write_texts()
                self._read()
                record.write_text(json.dumps(self.config.data_identity()), encoding="utf-8")
        if difference := settings_difference(
            json.loads(record.read_text(encoding="utf-8")), self.config.data_identity()
        ):
            raise MismatchError(
                f"{self.folder} was built with other settings (before -> now):\n{difference}\nUse another folder"
            )
        return {name: kdata.open(self.folder / name) for name in self.PARTS}

    def _write_texts(self) -> None:
        """Write NAME.parquet of each of PARTS."""
        c = self.config
        parts = {
            "heldout": Part(0.0, 0.1, c.heldout_tokens),
            "validation": Part(0.1, 0.16, c.validation_tokens),
            "train": Part(0.16, 1.0, c.train_tokens, balanced=False),
        }
        split(c.corpus, c.teacher, parts, self.folder)

    def _read(self) -> None:
        teacher_config = self.teacher_config()
        work = Work(self.config.context_tokens, writes=False)
        teacher = load_teacher(teacher_config, max_k=HELDOUT_KEEP.k, work=work)
        try:
            for name in self.PARTS:
                keep = KeepConfig() if name == "train" else HELDOUT_KEEP
                corpus = CorpusConfig(path=str(self.folder / f"{name}.parquet"))
                config = CaptureConfig(corpus=corpus, max_tokens=self.config.context_tokens, **keep.model_dump())
                capture_with(self._captured(name), teacher, teacher_config, Corpus(corpus), config)
        finally:
            teacher.close()
        self._prepare()
        reference = TeacherConfig(model=self.config.reference, backend="transformers")
        score(kdata.open(self.folder / "train"), ScoreConfig(model=reference))

    def teacher_config(self) -> TeacherConfig:
        """Settings of the teacher."""
        return TeacherConfig(model=self.config.teacher, backend=self.config.backend)

    def _captured(self, name: str) -> Path:
        """Folder of what the teacher reads of a part."""
        return self.folder / name

    def _prepare(self) -> None:
        """Make each part's dataset of what was captured, where it is another one."""

    def _plan(self, step: Step | None) -> Path | None:
        if step is None:
            return None
        dataset = self._datasets["train"]
        path = dataset.path / "plans" / f"{step.name or step.method}.parquet"
        with FileLock(self.folder / "plans.lock"):
            if not path.with_suffix(".json").exists():
                select(dataset, self._ready(step))
        Plan.load(path).check(dataset)
        return path

    def _ready(self, step: Step) -> Step:
        """Make what a step needs beside the dataset, and return the step with it."""
        return step

    def _tokens(self) -> dict[str, int]:
        """Tokens of each domain of the training text, by name."""
        index = self._datasets["train"].index(["domain", "num_tokens"])
        tokens = index.group_by("domain").aggregate([("num_tokens", "sum")])
        return dict(sorted(zip(tokens["domain"].to_pylist(), tokens["num_tokens_sum"].to_pylist(), strict=True)))

    def train_config(self, setting: Setting, seed: int) -> TrainConfig:
        """Settings of one training run."""
        c = self.config
        mixture = None if setting.mixture is None else setting.mixture(self._tokens(), c)
        if isinstance(mixture, DDKMixture):
            mixture = mixture.model_copy(update={"heldout": str(self._datasets["validation"].path)})
        return TrainConfig(
            label=setting.name,
            student=c.student,
            objective=ObjectiveConfig(weights=dict(setting.objective)),
            mixture=mixture,
            steps=c.steps * setting.times,
            batch_tokens=c.batch_tokens,
            context_tokens=c.context_tokens,
            seed=seed,
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            precision=c.precision,
            checkpoint_every_steps=0,
        )

    def measure(self, name: str, seed: int) -> Figures:
        """Train and measure one student.

        Returns:
            nll, kl, ece, top1 over all held-out tokens, and `bits_per_byte`; `gap DOMAIN`, the student's NLL minus the
            teacher's in nats per token, with mean_gap and worst_gap; `share DOMAIN`, share of the training tokens; tokens
            and tokens_per_sec.
        """
        setting = self.find(name)
        config, plan = self.train_config(setting, seed), self._plan_of(setting)
        data = self._datasets
        with tempfile.TemporaryDirectory(prefix="kdata-evidence-") as out:
            result = train(config, data["train"].path, plan, Path(out))
            measured = evaluate(Path(out) / "model", data["heldout"].path)
            shares = _mean_weights(Path(out) / "metrics.jsonl", config.steps)
            more = self._more_figures(plan, Path(out) / "model")
        if not shares:
            shares = _shares(self._tokens()) if plan is None else {
                d: s["plan"] for d, s in Plan.load(plan).info.shares.items()
            }  # fmt: skip
        gaps = {domain: figures["nll"] - figures["teacher_nll"] for domain, figures in measured["domains"].items()}
        return {
            **{name: measured["overall"][name] for name in ("nll", "kl", "ece", "top1", "teacher_nll")},
            **bits_per_byte(measured["overall"]),
            "mean_gap": sum(gaps.values()) / len(gaps),
            "worst_gap": max(gaps.values()),
            **{f"gap {domain}": gap for domain, gap in sorted(gaps.items())},
            **{f"share {domain}": share for domain, share in sorted(shares.items())},
            "tokens": result.tokens,
            "tokens_per_sec": result.tokens / result.train_seconds,
            "params": result.params,
            **more,
        }

    def find(self, name: str) -> Setting:
        """A setting by its key. Raises ConfigError if there is none."""
        return find(self.question, name)

    def _plan_of(self, setting: Setting) -> Path | None:
        return self._plan(setting.step)

    def _more_figures(self, plan: Path | None, model: Path) -> Figures:
        """Further figures of a student that was trained on a plan."""
        return {}


def _shares(tokens: Tokens) -> dict[str, float]:
    """Share of each domain."""
    return {domain: number / sum(tokens.values()) for domain, number in tokens.items()}


def _mean_weights(metrics: Path, steps: int) -> dict[str, float]:
    """Domain weights averaged over the run; empty without a mixture."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    periods = [(line["step"] - 1, line["mixture"]["weights"]) for line in lines if "mixture" in line]
    mean: dict[str, float] = {}
    for number, (begin, weights) in enumerate(periods):
        end = periods[number + 1][0] if number + 1 < len(periods) else steps
        for domain, weight in weights.items():
            mean[domain] = mean.get(domain, 0.0) + weight * (end - begin) / steps
    return mean


def key_of(setting: Setting) -> str:
    """Name of a run: settings of different families may share a name."""
    return setting.name if setting.family == "mixture" else f"{setting.name} ({setting.family})"


def find(question: Question, key: str) -> Setting:
    """A setting by its key. Raises ConfigError if there is none."""
    return by_name({key_of(s): s for s in SETTINGS[question]}, key)


def runs(question: Question, seeds: int) -> list[tuple[str, int]]:
    """(setting, seed) of every run, by family and then by seed; settings with more steps last."""
    groups = dict.fromkeys((s.times, s.family) for s in SETTINGS[question])
    of_group = {
        g: [key_of(s) for s in SETTINGS[question] if (s.times, s.family) == g]
        for g in sorted(groups, key=lambda g: g[0])
    }
    return [(key, seed) for keys in of_group.values() for seed in range(seeds) for key in keys]
