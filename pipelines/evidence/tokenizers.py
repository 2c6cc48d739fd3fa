"""Question 3: can a student with another tokenizer learn from the stored beliefs?

One dataset, captured with the teacher's tokenizer, is retokenized for a byte-level BPE of 4,096 ids that is trained on the
same text, and for bytes (259 ids). Each student is compared with its twin, which has the same tokenizer, initial weights and
batches, and learns from the text alone; students of different tokenizers by bits per byte. "with text" adds the cross-entropy
of the actual token where no distribution is kept. With ULD and GOLD the text counts everywhere, as in ULD's own code; their
students are measured on the same held-out data as the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
from filelock import FileLock
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kdata
from kdata.config import Strict
from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import SORTED_MAPS
from kdata.jobs.retokenize import RetokenizeConfig, retokenize
from kdata.pipelines.evidence.data import DataConfig, EvidenceData
from kdata.pipelines.evidence.figures import text_of, write_results
from kdata.pipelines.evidence.runs import Figures, by_name
from kdata.pipelines.evidence.students import train_and_measure
from kdata.pipelines.evidence.summary import relative_difference, summarise
from kdata.store.token_map import TokenMap
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.objective_config import ObjectiveConfig

Kind = Literal["teacher's", "BPE 4k", "bytes"]
SPECIAL = ["<pad>", "<s>", "</s>"]
TEXT = {"cross_entropy": 1.0}
CONTEXT = 64  # tokens of the teacher in a sequence


@dataclass(frozen=True)
class Setting:
    """One way to train. elsewhere: weight of the text where no distribution is kept. map, inside: see `RetokenizeConfig`."""

    tokenizer: Kind
    name: str
    weights: Mapping[str, float] = field(default_factory=lambda: TEXT)
    elsewhere: float | None = None
    map: TokenMap = "prefix"
    inside: bool = False

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.tokenizer}: {self.name}"


def _other(tokenizer: Kind) -> tuple[Setting, ...]:
    return (
        Setting(tokenizer, "text alone", elsewhere=1.0),
        Setting(tokenizer, "entries (prefix), with text", {"forward_kl": 1.0}, 1.0),
        Setting(tokenizer, "ALM", {"alm": 1.0}),
        Setting(tokenizer, "entries (prefix) and ALM", {"forward_kl": 1.0, "alm": 1.0}),
        Setting(tokenizer, "entries (prefix, inside), with text", {"forward_kl": 1.0}, 1.0, inside=True),
        Setting(tokenizer, "text and ULD", {"cross_entropy": 1.0, "uld": 1.5}, 1.0, "ranks"),
        Setting(tokenizer, "text and GOLD", {"cross_entropy": 1.0, "gold": 1.0}, 1.0, "matched"),
        Setting(tokenizer, "GOLD alone", {"gold": 1.0}, map="matched"),
        Setting(tokenizer, "entries (exact), with text", {"forward_kl": 1.0}, 1.0, "exact"),
    )


SETTINGS = (
    Setting("teacher's", "text alone"),
    Setting("teacher's", "entries", {"forward_kl": 1.0}),
    *_other("BPE 4k"),
    *_other("bytes")[:-1],  # no token of another vocabulary but bytes themselves is equal to a byte
)


class TokenizersConfig(Strict):
    """Settings that all students share."""

    data: DataConfig = Field(
        description="Text and teacher; short sequences, since those of bytes are several times as long."
    )
    student: ScratchStudent = Field(
        default_factory=lambda: ScratchStudent(hidden_size=128, num_layers=4, num_heads=4),
        description="Sizes of the model to train.",
    )
    steps: int = Field(200, ge=1, description="Number of optimizer steps.")
    batch_tokens: int = Field(4096, ge=2, description="Token positions of one step; padding counts.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear rise to the peak; 0: none.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Precision of the student's matrix products.")

    def identity(self) -> dict[str, Any]:
        """The settings that the figures depend on."""
        return self.model_dump(mode="json", exclude={"data": {"teacher", "corpus"}})


class Tokenizers:
    """The comparison: `measure` trains one setting with one seed and measures the student."""

    def __init__(self, config: TokenizersConfig, data: EvidenceData) -> None:
        self.config, self.data = config, data

    def measure(self, key: str, seed: int) -> Figures:
        """Train and measure one student; `bits_per_byte` beside the usual figures."""
        setting, c = find(key), self.config
        train, heldout = self._datasets(setting)
        longest = max(train.index(["num_tokens"])["num_tokens"].to_pylist())
        context_tokens = 1 << (max(longest, c.data.context_tokens) - 1).bit_length()  # a step is a multiple of it
        config = TrainConfig(
            label=key,
            student=c.student.model_copy(update={"max_positions": max(context_tokens, c.student.max_positions)}),
            objective=ObjectiveConfig(weights=dict(setting.weights), cross_entropy_elsewhere=setting.elsewhere),
            steps=c.steps,
            batch_tokens=c.batch_tokens,
            context_tokens=context_tokens,
            seed=seed,
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            precision=c.precision,
            data_order="seed",
            checkpoint_every_steps=0,
        )
        return train_and_measure(config, train, heldout)

    def _datasets(self, setting: Setting) -> tuple[kdata.Dataset, kdata.Dataset]:
        """Text to train on, and held-out text, in the setting's tokens. Without distributions every target counts."""
        made = (self.data.train(KeepConfig()), self.data.heldout)
        if setting.tokenizer == "teacher's":
            return made
        folder = self.data.folder / setting.tokenizer.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "made.lock"):
            tokenizer = folder / "tokenizer"
            if not (tokenizer / "tokenizer.json").exists():
                self._tokenizers[setting.tokenizer].save_pretrained(tokenizer)
            measured: TokenMap = "prefix" if setting.map in SORTED_MAPS else setting.map
            parts = zip(("train", "heldout"), made, (setting.map, measured), strict=True)
            common = {"tokenizer": str(tokenizer), "inside": setting.inside}
            train, heldout = (
                self._retokenized(folder, name, part, RetokenizeConfig(map=map, **common)) for name, part, map in parts
            )
        return train, heldout

    def _retokenized(self, folder: Path, name: str, part: kdata.Dataset, config: RetokenizeConfig) -> kdata.Dataset:
        kind = f"{config.map}-inside" if config.inside else config.map
        return retokenize(folder / f"{name}-{kind}", part, config)[0]

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        texts = pl.read_parquet(self.data.folder / "train.parquet")["text"].to_list()
        return {"bytes": byte_level([], 0), "BPE 4k": byte_level(texts, 4096)}


def byte_level(texts: list[str], size: int) -> Any:
    """A byte-level BPE of so many ids, trained on some texts; without texts, one that has a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if texts:
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def write_report(out: Path, by_setting: Mapping[str, Mapping[int, Figures]]) -> str:
    """Write results.json and table.md of the runs that are measured; return the table."""
    means = {name: summarise(seeds) for name, seeds in by_setting.items()}
    twins = {name: f"{name.partition(':')[0]}: text alone" for name in means}
    against = {
        name: relative_difference(by_setting[name], by_setting.get(twin, {}), "nll") for name, twin in twins.items()
    }
    write_results(out, by_setting, means, {"nll_against_text_alone": against})
    lines = ["| student's tokenizer: learns from | bits per byte | NLL against its twin | seeds |", "|---|---|---|---|"]
    for name, estimates in means.items():
        difference = "-" if name == twins[name] else text_of(against[name], 2, 100, "%", sign="+")
        cells = [name, text_of(estimates["bits_per_byte"], 3), difference, str(estimates["nll"].count)]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    return table


def find(key: str) -> Setting:
    """A setting by its name. Raises ConfigError if there is none."""
    return by_name({s.key: s for s in SETTINGS}, key)


def runs(seeds: int) -> list[tuple[str, int]]:
    """(setting, seed) of every run."""
    return [(s.key, seed) for seed in range(seeds) for s in SETTINGS]
