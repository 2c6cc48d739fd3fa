"""Question `raw`: does choosing help where there is something to choose? Methods of selection on a raw corpus (`raw.py`).

Every student of a seed begins with the same weights and reads as many tokens as the others, of what one method kept; it is
measured on held-out clean text. Part of the held-out text has leaked into the corpus (`benchmark`) and is measured apart. The
judge says of each method which share of what it kept is good (precision), and which share of the good it kept (recall).

With a language model as teacher the rows are retokenized for students with a small tokenizer, that of the reference: methods
and students then see what the teacher believes of the reference's tokens, and the question fits two cores.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow.parquet as pq
import torch
from filelock import FileLock
from pydantic import Field

import kdata
from kdata.format.files import write_atomically
from kdata.format.json_text import read_json
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.inspect import inspect_dataset
from kdata.jobs.retokenize import RetokenizeConfig, retokenize
from kdata.jobs.scoring import ScoreConfig, score
from kdata.pipelines.evidence.data import Part, split
from kdata.pipelines.evidence.raw import Judge, write_raw
from kdata.pipelines.evidence.runs import Figures, by_name
from kdata.pipelines.evidence.selection import DISTIL, PLAIN, Selection, SelectionConfig, Setting, Tokens, key_of
from kdata.pipelines.evidence.small_runs import SEED, SHARE_OF_STEPS, STUDENT, TABLES, olmix_tables, regmix_table
from kdata.selection.band import Band
from kdata.selection.confidence import Confidence, Margin
from kdata.selection.margins import score_margins
from kdata.selection.mixtures import Mixture
from kdata.selection.plan import Plan, make_plan
from kdata.selection.prune import Prune, distillation_weight
from kdata.selection.ranked import All, Difference, Random
from kdata.selection.robust import Robust
from kdata.selection.score_file import bring
from kdata.selection.select import select
from kdata.selection.step import Step
from kdata.selection.tables import Olmix, RegMix
from kdata.share.arrange import split as split_rows
from kdata.store.listed import SCORES
from kdata.teachers.config import TeacherConfig
from kdata.trainer.config import CheckpointStudent, TrainConfig
from kdata.trainer.domain_weights import DDKMixture, FixedMixture
from kdata.trainer.evaluate import evaluate
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.train import train

REFERENCE = "ref"  # score of the small model: the reference of difference sampling, and the student before training
# Scores of references that have read the raw corpus once, as that of MiniPLM, and whether they start from the small model.
READERS = {"read_on": True, "read_alone": False}
READER_SEED = 100  # no student has it
KEPT = "kept.json"
NONE, ORACLE = "no selection", "oracle (knows the origin)"


@dataclass(frozen=True)
class Arm(Setting):
    """A setting of this question.

    oracle: the judge chooses. trained: the student starts from the reference, not from random weights.
    """

    oracle: bool = False
    trained: bool = False

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        step = {} if self.step is None else {"step": self.step.model_dump(mode="json", exclude_none=True)}
        mixture = {} if self.mixture is None else {"mixture": "ddk"}
        return {
            **step,
            **mixture,
            "objective": dict(self.objective),
            "family": self.family,
            "oracle": self.oracle,
            "trained": self.trained,
        }


def _difference(name: str, share: float, *, score: str = REFERENCE, **settings: Any) -> Difference:
    return Difference(name=name, share=share, count_by="tokens", score=score, **settings)


def _ddk(tokens: Tokens, config: SelectionConfig) -> DDKMixture:
    return DDKMixture(every_steps=config.period_steps)


# What a curator would ask for who knows the six sources and no origin: limits of Gopher and C4 that prose, verse, mathematics
# and code pass alike. Set before the judge was asked.
HYGIENE = [
    "duplicates.near_keep",
    "coalesce(overlap.benchmark_share, 0) < 0.5",
    "language.code = 'en' or rows.domain = 'code'",
    "quality.broken < 0.001",
    "quality.top_2gram <= 0.20 and quality.repeated_10grams <= 0.10",
    "quality.policy = 0",
    "quality.digits < 0.3",
    "quality.stop_words >= 2 or rows.domain = 'code'",
]
REPEATS = 3.0  # how often a document of a domain may be read that is small for its weight; without, plans are too small
HALF: dict[str, Any] = {"share": 0.5, "count_by": "tokens"}
ARMS = (
    Arm(NONE, ""),
    Arm(ORACLE, "", oracle=True),
    Arm("hygiene", "", All(name="hygiene", where=HYGIENE)),
    Arm("random half", "", Random(name="half", **HALF)),
    Arm("difference, half of each domain", "", _difference("each", 0.5, by_domain=True)),
    Arm("hygiene, then difference, 75 % of each domain", "",
        _difference("clean75", 0.75, by_domain=True, where=HYGIENE)),
    Arm("difference, half", "", _difference("difference", 0.5)),
    Arm("DDK", "", mixture=_ddk),
    Arm("hygiene, then the middle 80 % of the NLL of each domain", "",
        Band(name="clean80", low=0.1, high=0.9, by_domain=True, where=HYGIENE)),
    Arm("difference, 30 % of each domain", "", _difference("each30", 0.3, by_domain=True)),
    Arm("difference, 75 % of each domain", "", _difference("each75", 0.75, by_domain=True)),
    Arm("middle of the teacher's NLL, half of each domain", "", Band(by_domain=True)),
    Arm("easiest half of each domain", "", Prune(name="easy", keep="easy", by_domain=True, **HALF)),
    Arm("hardest half of each domain", "", Prune(name="hard", keep="hard", by_domain=True, **HALF)),
    Arm("joint confidence, half of each domain", "", Confidence(score=REFERENCE, **HALF)),
    Arm("margin, half of each domain", "", Margin(**HALF)),
    Arm("robust (max-min), half", "", Robust()),
    Arm("RegMix", "", RegMix(runs=TABLES["regmix"], max_repeats=REPEATS)),
    Arm("Olmix", "", Olmix(former=TABLES["former"], runs=TABLES["olmix"], max_repeats=REPEATS)),
    Arm("difference, reference read the corpus, half of each domain", "",
        _difference("read_on_each", 0.5, by_domain=True, score="read_on")),
    Arm("difference, reference read the corpus, half", "", _difference("read_on_half", 0.5, score="read_on")),
    Arm("difference, reference read the corpus alone, half of each domain", "",
        _difference("read_alone_each", 0.5, by_domain=True, score="read_alone")),
    Arm("difference, reference read the corpus alone, half", "", _difference("read_alone_half", 0.5, score="read_alone")),
)  # fmt: skip
MIXED = {"forward_kl": distillation_weight(0.5), "cross_entropy": 1 - distillation_weight(0.5)}
FAMILIES = {"distillation": DISTIL, "cross-entropy": PLAIN}
TRAINED = "distillation, trained start"
FIRST = 7  # arms; a run that is stopped early has measured these, with random and with trained start
SETTINGS: tuple[Arm, ...] = (
    *(replace(arm, family=family, objective=weights) for arm in ARMS[:FIRST] for family, weights in FAMILIES.items()),
    Arm(NONE, TRAINED, trained=True),
    Arm(ORACLE, TRAINED, oracle=True, trained=True),
    Arm("DDK", TRAINED, mixture=_ddk, trained=True),
    *(replace(arm, family=family, objective=weights) for arm in ARMS[FIRST:] for family, weights in FAMILIES.items()),
    Arm("random half", "distillation, weight 0.75", Prune(name="pruned", **HALF), objective=MIXED),
)


def settings_of(tokenizer: str | None) -> tuple[Arm, ...]:
    """The settings of a comparison.

    With a tokenizer of the students' own, no trained start and no weights of domains, which small sizes do not answer.
    """
    if tokenizer is None:
        return SETTINGS
    return tuple(
        arm for arm in SETTINGS if arm.family in FAMILIES and arm.mixture is None and not isinstance(arm.step, Mixture)
    )


class RawConfig(SelectionConfig):
    """Settings that all students share."""

    train_tokens: int = Field(900_000, ge=1, description="Tokens of the raw corpus.")
    heldout_tokens: int = Field(24_000, ge=1, description="Tokens to measure on, the same number of each domain.")
    benchmark_tokens: int = Field(18_000, ge=1, description="Tokens of held-out text that leaked into the corpus.")
    steps: int = Field(400, ge=1, description="Number of optimizer steps; with the defaults half of the corpus.")
    warmup_steps: int = Field(40, ge=0, description="Steps of linear rise to the peak; 0: none.")
    period_steps: int = Field(40, ge=1, description="Steps between two updates of domain weights.")

    clean_times: int = Field(
        2,
        ge=2,
        exclude_if=lambda times: times == 2,
        description="Clean text to make the corpus of, in multiples of its tokens; long documents are left out of it.",
    )
    tokenizer: str | None = Field(
        None,
        exclude_if=lambda tokenizer: tokenizer is None,
        description="Folder of the students' tokenizer, which is that of the reference; null: the teacher's.",
    )
    bos: Literal["add", "omit"] | None = Field(
        None, exclude_if=lambda bos: bos is None, description="See `TeacherConfig`."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", exclude_if=lambda dtype: dtype == "float32", description="See `TeacherConfig`."
    )

    def data_identity(self) -> dict[str, Any]:
        """See `SelectionConfig.data_identity`."""
        own = self.model_dump(mode="json", include={"clean_times", "tokenizer", "bos", "dtype"})
        if self.tokenizer is not None:
            own["tokenizer"] = Path(self.tokenizer).name
        return {**super().data_identity(), "benchmark_tokens": self.benchmark_tokens, **own}


class Raw(Selection):
    """The comparison: `measure` trains one setting with one seed and measures the student.

    Its figures are those of `Selection.measure` and nll_benchmark, the NLL of the leaked text.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("heldout", "benchmark", "validation", "train")
    config: RawConfig

    def __init__(self, config: RawConfig, folder: Path) -> None:
        super().__init__(config, "selection", folder)

    def _write_texts(self) -> None:
        """The corpus, unless an attempt that was stopped has written it: a language model takes minutes for its part."""
        c = self.config
        identity, record = json.dumps(c.data_identity()).encode(), self.folder / "texts.json"
        if record.exists() and record.read_bytes() == identity:
            return
        parts = {
            "heldout": Part(0.0, 0.1, c.heldout_tokens),
            "benchmark": Part(0.1, 0.13, c.benchmark_tokens),
            "validation": Part(0.13, 0.19, c.validation_tokens),
            # More than there will be in all: the rest is what shuffled and repeated texts are made of.
            "clean": Part(0.19, 1.0, c.clean_times * c.train_tokens, balanced=False),
        }
        split(c.corpus, c.teacher, parts, self.folder)
        write_raw(
            self.folder / "clean.parquet", self.folder / "benchmark.parquet", c.teacher, c.train_tokens, self.folder,
            context_tokens=c.context_tokens, bos=c.bos, dtype=getattr(torch, c.dtype),
        )  # fmt: skip
        write_atomically(record, identity)

    def teacher_config(self) -> TeacherConfig:
        """See `Selection.teacher_config`."""
        return super().teacher_config().model_copy(update={"bos": self.config.bos, "dtype": self.config.dtype})

    def _captured(self, name: str) -> Path:
        return self.folder / (name if self.config.tokenizer is None else f"{name}-read")

    def _prepare(self) -> None:
        """Retokenized parts, without rows longer than a step: scripts that a small tokenizer spells byte by byte."""
        if self.config.tokenizer is None:
            return
        for name in (name for name in self.PARTS if not (self.folder / name).exists()):
            config, whole = RetokenizeConfig(tokenizer=self.config.tokenizer), self.folder / f"{name}-whole"
            rows, _ = retokenize(whole, kdata.open(self._captured(name)), config)
            select(rows, All(name=name, where=[f"num_tokens <= {self.config.batch_tokens}"]))
            plan = Plan.load(whole / "plans" / f"{name}.parquet")
            parts = split_rows(rows, self.folder / f"{name}-parts", by="plan", plan=plan)
            parts[name].path.rename(self.folder / name)

    def _read(self) -> None:
        super()._read()
        train = kdata.open(self.folder / "train")
        if self.config.tokenizer is None:
            score_margins(train)
        # The sets that a curator would name: the benchmark, of which the corpus holds all.
        sets = {"benchmark": str(self.folder / "benchmark.parquet")}
        inspect_dataset(
            train, HygieneConfig(checks=["duplicates", "overlap", "language", "quality"], overlap=sets, workers=1)
        )

    @cached_property
    def judge(self) -> Judge:
        """Knows the origin of each row."""
        index = self._datasets["train"].index(["id", "num_tokens"])
        rows = dict(zip(index["id"].to_pylist(), index["num_tokens"].to_pylist(), strict=True))
        return Judge(self.folder / "origins.parquet", rows)

    def find(self, name: str) -> Arm:
        """See `Selection.find`."""
        return find(name)

    def train_config(self, setting: Setting, seed: int) -> TrainConfig:
        """See `Selection.train_config`.

        A trained student gets half the learning rate. Retokenized rows hold distributions at some tokens; a distilled student
        learns from the text at the others.
        """
        config = super().train_config(setting, seed)
        if self.config.tokenizer is not None:
            longest = max(self._datasets["train"].index(["num_tokens"])["num_tokens"].to_pylist())
            elsewhere = 1.0 if "forward_kl" in setting.objective else None
            objective = ObjectiveConfig(weights=dict(setting.objective), cross_entropy_elsewhere=elsewhere)
            context_tokens = 1 << (longest - 1).bit_length()  # a step is a multiple of it
            config = config.model_copy(update={"objective": objective, "context_tokens": context_tokens})
        if isinstance(setting, Arm) and setting.trained:
            start = CheckpointStudent(model=self.config.reference)
            return config.model_copy(update={"student": start, "learning_rate": config.learning_rate / 2})
        return config

    def _plan_of(self, setting: Setting) -> Path | None:
        assert isinstance(setting, Arm)
        if setting.oracle:
            dataset = self._datasets["train"]
            path = dataset.path / "plans" / "oracle.parquet"
            with FileLock(self.folder / "plans.lock"):
                if not path.with_suffix(".json").exists():
                    make_plan(dataset, "oracle", self.judge.good(), method="oracle", parameters={}).save(path.parent)
            return path
        return self._plan(setting.step)

    def _ready(self, step: Step) -> Step:
        """See `Selection._ready`: references that read the corpus, and the small runs, are trained when a plan needs them."""
        if isinstance(step, Difference) and step.score in READERS:
            self._let_read(step.score)
        if isinstance(step, Margin | Robust) and self.config.tokenizer is not None:
            self._bring_margins()
        if isinstance(step, RegMix):
            return step.model_copy(update={"runs": str(regmix_table(self.folder, self._tokens(), self._small_loss))})
        if isinstance(step, Olmix):
            former, runs = olmix_tables(self.folder, self._tokens(), self._small_loss)
            return step.model_copy(update={"former": str(former), "runs": str(runs)})
        return step

    def _bring_margins(self) -> None:
        """Give retokenized rows, which lack second choices, the margins of the same rows in the teacher's tokens."""
        dataset, read = self._datasets["train"], kdata.open(self._captured("train"))
        if "margin" in dataset.listed(SCORES):
            return
        score_margins(read)
        ids = dataset.index(["id"])["id"].to_pylist()
        margins = read.sql("select id, margin from scores.margin where list_contains($ids, id)", {"ids": ids})
        with tempfile.TemporaryDirectory(prefix="kdata-evidence-") as folder:
            file = Path(folder) / "margins.parquet"
            pq.write_table(margins, file)
            bring(dataset, file, "margin", unit="mean of p1 - p2 over the targets in the teacher's tokens")

    def _small_loss(self, weights: Mapping[str, float]) -> float:
        """Loss of a tiny student on the validation text, nats per token, after it has read domains with these weights."""
        mixture = FixedMixture(
            weights={**dict.fromkeys(self._tokens(), 0.0), **weights}, every_steps=self.config.period_steps
        )
        config = self.train_config(Setting("small run", "mixture", mixture=lambda tokens, config: mixture), SEED)
        steps = math.ceil(SHARE_OF_STEPS * config.steps)
        config = config.model_copy(update={"student": STUDENT, "steps": steps, "warmup_steps": steps // 10})
        with tempfile.TemporaryDirectory(prefix="kdata-evidence-") as out:
            model = Path(out) / train(config, self._datasets["train"].path, None, Path(out)).model_dir
            return float(evaluate(model, self._datasets["validation"].path)["overall"]["nll"])

    def _let_read(self, name: str) -> None:
        """Train a reference on the raw corpus, and score the corpus with it: one of READERS."""
        dataset, out = self._datasets["train"], self.folder / f"reference-{name}"
        arm = Arm(name, "cross-entropy", objective=PLAIN, trained=READERS[name])
        config = self.train_config(arm, READER_SEED)
        steps = math.ceil(dataset.num_tokens / config.batch_tokens)
        config = config.model_copy(update={"steps": steps, "warmup_steps": steps // 10})
        model = out / train(config, dataset.path, None, out).model_dir
        score(dataset, ScoreConfig(name=name, model=TeacherConfig(model=str(model), backend="transformers")))

    def measure(self, name: str, seed: int) -> Figures:
        """See `Selection.measure`. The first call judges every setting, which takes no student: `KEPT` in the folder."""
        self.judge_all()
        return super().measure(name, seed)

    def judge_all(self) -> None:
        """Write what each setting keeps, as the judge sees it: `KEPT`. A mixture reads all rows, so it keeps everything."""
        file = self.folder / KEPT
        rows = self._datasets["train"]
        with FileLock(file.with_suffix(".lock")):
            before = read_json(file) if file.exists() else {}
            arms = {arm.name: arm for arm in settings_of(self.config.tokenizer)}
            if before.keys() == arms.keys():
                return
            kept = {name: before.get(name) or self._judge(rows, arm) for name, arm in arms.items()}
            write_atomically(file, json.dumps(kept, indent=1).encode())

    def _judge(self, rows: kdata.Dataset, arm: Arm) -> dict[str, Any]:
        plan = self._plan_of(arm)
        ids = rows.index(["id"])["id"].to_pylist() if plan is None else Plan.load(plan).ids
        return asdict(self.judge.verdict(set(ids)))

    def _more_figures(self, plan: Path | None, model: Path) -> Figures:
        return {"nll_benchmark": evaluate(model, self._datasets["benchmark"].path)["overall"]["nll"]}


def find(key: str) -> Arm:
    """A setting by its key. Raises ConfigError if there is none."""
    return by_name({key_of(arm): arm for arm in SETTINGS}, key)


def describe(key: str) -> Mapping[str, Any]:
    """The content of a setting, by its key, as JSON values."""
    return find(key).describe()


def runs(seeds: int, tokenizer: str | None = None) -> list[tuple[str, int]]:
    """(setting, seed) of every run: every setting with one seed, then with the next."""
    return [(key_of(arm), seed) for seed in range(seeds) for arm in settings_of(tokenizer)]
