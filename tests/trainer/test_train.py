"""The loop: it learns, resumes bit-equal after a kill, accumulates exactly, and stops on NaN."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import kdata
import kdata.trainer.checkpoint as checkpoint
import kdata.trainer.train as module
from kdata.config import parse_config
from kdata.errors import (
    ConfigError,
    CorruptError,
    DataError,
    MismatchError,
    MissingError,
    StorageError,
    TrainingError,
)
from kdata.loader.batches import Arrays, Batches
from kdata.selection.plan import make_plan
from kdata.trainer.config import (
    CheckpointStudent,
    EvaluateConfig,
    PhaseConfig,
    PrunedStudent,
    ScratchStudent,
    TrainConfig,
    TrainResult,
)
from kdata.trainer.domain_weights import DDKMixture, FixedMixture
from kdata.trainer.evaluate import evaluate
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.schedule import Ramp, learning_rate
from kdata.trainer.student import build_student, num_parameters
from kdata.trainer.train import train
from tests import bucket  # noqa: F401  registers bucket://
from tests.trainer.datasets import VOCAB, make_dataset, save_tokenizer
from tests.trainer.runs import lines

LENGTHS = [5 + (i * 7) % 40 for i in range(120)]


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": ScratchStudent(hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
        "steps": 20,
        "batch_tokens": 256,
        "context_tokens": 64,
        "warmup_steps": 3,
        "learning_rate": 5e-3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 10,
    }
    return TrainConfig(**{**base, **changes})


def losses(out: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["cross_entropy"], r["grad_norm"], r["lr"], r["tokens"]) for r in lines(out)]


@pytest.fixture(scope="module")
def whole(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(), dataset.path, None, out)
    return out


def test_a_student_learns_the_chain_and_everything_is_written(dataset: kdata.Dataset, tmp_path: Path) -> None:
    result = train(config(steps=120, checkpoint_every_steps=0), dataset.path, None, tmp_path / "run")
    first, last = lines(tmp_path / "run")[0], lines(tmp_path / "run")[-1]
    assert first["forward_kl"] > 1.5 and last["forward_kl"] < 0.15  # impossible with targets one position off
    assert result == TrainResult.model_validate_json((tmp_path / "run" / "train.json").read_bytes())
    assert result.steps == 120 and result.tokens == last["tokens"] < 120 * 256
    mix = 0.1 * last["cross_entropy"] + 0.9 * last["forward_kl"]
    assert result.losses["loss"] == pytest.approx(mix, rel=1e-5)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"model", "train.json", "metrics.jsonl", "checkpoints"}
    again = build_student(CheckpointStudent(model=str(tmp_path / "run" / "model")), dataset, 0)
    assert num_parameters(again) == result.params


def test_a_run_killed_and_resumed_gives_bit_equal_losses(dataset: kdata.Dataset, whole: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of step 14; step 10 is the newest checkpoint."""
    out = tmp_path / "run"
    script = (
        "import os, signal, sys, kdata.trainer.train as t\n"
        "real = t._gradients\n"
        "def dying(*args):\n"
        "    if args[-1] == 14: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "t._gradients = dying\n"
        "from pathlib import Path\n"
        "t.train(t.TrainConfig.model_validate_json(sys.argv[1]), sys.argv[2], None, Path(sys.argv[3]))\n"
    )
    arguments = [sys.executable, "-c", script, config().model_dump_json(), str(dataset.path), str(out)]
    killed = subprocess.run(
        arguments, env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [r["step"] for r in lines(out)] == list(range(1, 14))
    train(config(), dataset.path, None, out)
    assert losses(out) == losses(whole)
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_a_finished_run_called_again_keeps_its_only_checkpoint(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has nothing to write, so a kill then cannot take the checkpoint away; nor is the last one written twice."""
    saved: list[int] = []
    real = module.save_checkpoint

    def count(root: Path, model: object, optimizer: object, state: checkpoint.CheckpointState, ranks: object) -> Path:
        saved.append(state.step)
        return real(root, model, optimizer, state, ranks)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_checkpoint", count)
    train(config(), dataset.path, None, tmp_path)
    train(config(), dataset.path, None, tmp_path)
    assert saved == [10, 20]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_the_random_state_resumes(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """A student with dropout, stopped and resumed: every mask as if nothing had happened."""
    gpt2 = tmp_path / "gpt2"
    tiny = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(tiny).save_pretrained(gpt2)
    save_tokenizer(gpt2)
    settings = config(student=CheckpointStudent(model=str(gpt2)), steps=8, checkpoint_every_steps=3)
    train(settings, dataset.path, None, tmp_path / "whole")
    assert tiny.resid_pdrop > 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = module._gradients

        def stopping(*args: Any) -> object:
            if args[-1] == 6:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(module, "_gradients", stopping)
        train(settings, dataset.path, None, tmp_path / "run")
    torch.manual_seed(12345)
    train(settings, dataset.path, None, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_document_beyond_the_students_positions_is_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    build_student(
        ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=32), dataset, 0
    ).save_pretrained(folder)
    save_tokenizer(folder)
    student = CheckpointStudent(model=str(folder))
    with pytest.raises(DataError, match=r"a document has 44 tokens, the student has 32 positions; .*num_tokens <= 32"):
        train(config(student=student), dataset.path, None, tmp_path / "run")
    index = dataset.index(["id", "num_tokens"]).to_pylist()
    ids = [row["id"] for row in index if row["num_tokens"] <= 32]
    plan = make_plan(dataset, "short", ids, method="sql", parameters={}).save(tmp_path / "plans")
    assert train(config(student=student, steps=2, warmup_steps=0), dataset.path, plan, tmp_path / "run").steps == 2


def test_data_without_a_counted_token_is_refused(tmp_path: Path) -> None:
    masked = make_dataset(tmp_path / "masked", LENGTHS[:8], mask_every=1)
    with pytest.raises(DataError, match=r"none of the tokens in 8 rows is a target .* nothing to learn"):
        train(config(), masked.path, None, tmp_path / "run")


def test_an_output_folder_that_cannot_be_made_is_named(dataset: kdata.Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        train(config(), dataset.path, None, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["dataset.json", "manifest.jsonl"])
def test_a_dataset_s_folder_is_not_trained_into(dataset: kdata.Dataset, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ConfigError, match="is a dataset; name another folder"):
        train(config(), dataset.path, None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"dataset": "nowhere"}, MissingError, "nowhere does not exist"),
        ({"dataset": "empty"}, MissingError, "empty"),
        ({"plan": "nowhere"}, MissingError, r"plan 'nowhere': .* does not exist; .*`kdata select`"),
        ({"student": "nowhere"}, MissingError, r"student\.model '.*nowhere' cannot be loaded: .*name a folder"),
        ({"student": "empty"}, MissingError, r"student\.model '.*empty' cannot be loaded: .*name a folder"),
        (
            {"student": "foreign"},
            MismatchError,
            "tokenizers of .* and the student .* are not the same: .* choose a student",
        ),
    ],
)
def test_missing_or_foreign_input_is_one_line_and_nothing_is_written(
    dataset: kdata.Dataset, tmp_path: Path, names: dict[str, str], error: type[Exception], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    build_student(config().student, dataset, 0).save_pretrained(tmp_path / "foreign")  # type: ignore[arg-type]
    save_tokenizer(tmp_path / "foreign", VOCAB - 1)
    student = CheckpointStudent(model=str(tmp_path / names["student"])) if "student" in names else config().student
    data = tmp_path / names["dataset"] if "dataset" in names else dataset.path
    with pytest.raises(error, match=message) as caught:
        train(config(student=student), data, names.get("plan"), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_the_run_resumes(
    dataset: kdata.Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may have no more than 1,000 bytes for a while; safetensors reports that with an error of its own."""
    real = checkpoint.save_file

    def refusing(tensors: dict, path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            real(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "save_file", refusing)
    with pytest.raises(StorageError, match=r"cannot write .*File too large.*run the same command again") as caught:
        train(config(), dataset.path, None, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr(checkpoint, "save_file", real)
    train(config(), dataset.path, None, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)


def test_a_dataset_at_a_url_trains_and_measures_the_same_student(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(dataset.path, tmp_path / "bucket" / "set")
    url, c = f"bucket://{tmp_path}/bucket/set", config(steps=4)
    assert train(c, url, None, tmp_path / "far").dataset_digest == dataset.content_digest
    train(c, dataset.path, None, tmp_path / "near")
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    measured = [evaluate(tmp_path / "far" / "model", place)["overall"] for place in (url, dataset.path)]
    assert measured[0] == measured[1]
    make_plan(dataset, "few", ["doc-1", "doc-3"], method="sql", parameters={}).save(tmp_path / "bucket/set/plans")
    result = train(config(steps=1, warmup_steps=0, batch_tokens=64), url, "few", tmp_path / "few")
    assert result.plan == "few" and result.tokens == LENGTHS[1] + LENGTHS[3]


def test_the_result_of_an_older_run_is_read(whole: Path) -> None:
    """`phases` was `stages`, `student.model` `student.path`, `compared_tokens` `window_tokens`; refused in settings."""
    content = json.loads((whole / "train.json").read_text())
    content["config"]["objective"] = {"window_tokens": 8}
    content["config"]["stages"] = content["config"].pop("phases") or [{"name": "one"}]
    content["config"]["student"] = {"kind": "checkpoint", "path": "MODEL", "revision": None}
    result = TrainResult.model_validate_json(json.dumps(content))
    assert result.config.phases == [PhaseConfig(name="one")]
    assert result.config.student == CheckpointStudent(model="MODEL")
    assert result.config.objective.compared_tokens == 8
    assert result.dataset_digest == content["dataset_fingerprint"]
    with pytest.raises(ConfigError, match="unknown key 'stages'"):
        parse_config(TrainConfig, {"stages": []}, "settings")
    with pytest.raises(ConfigError, match=r"unknown key 'student\.path'"):
        parse_config(TrainConfig, {"student": {"kind": "checkpoint", "model": "M", "path": "M"}}, "settings")


def test_a_finished_run_is_not_trained_again(dataset: kdata.Dataset, whole: Path) -> None:
    before = losses(whole)
    result = train(config(), dataset.path, None, whole)
    assert result.steps == 20 and losses(whole) == before


def test_other_settings_or_data_do_not_resume(dataset: kdata.Dataset, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"learning_rate: 0\.005 -> 0\.001"):
        train(config(learning_rate=1e-3), dataset.path, None, whole)
    other = make_dataset(tmp_path / "other", LENGTHS, seed=9)
    with pytest.raises(MismatchError, match=r"phases\.train\.data: "):
        train(config(), other.path, None, whole)


def test_a_damaged_checkpoint_is_named(dataset: kdata.Dataset, tmp_path: Path) -> None:
    train(config(steps=4), dataset.path, None, tmp_path)
    tensors = next(tmp_path.glob("checkpoints/step-*/tensors.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(CorruptError, match="step-00000004"):
        train(config(steps=4), dataset.path, None, tmp_path)


def test_accumulated_micro_batches_give_the_losses_of_one_batch(
    dataset: kdata.Dataset, whole: Path, tmp_path: Path
) -> None:
    train(config(micro_batch_tokens=64), dataset.path, None, tmp_path / "run")
    for got, want in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert got[1:] == pytest.approx(want[1:], rel=2e-4)


def test_activations_computed_again_give_the_same_bits(
    dataset: kdata.Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"keep": 0, "again": 0}
    real = LlamaDecoderLayer.forward

    def count(self: LlamaDecoderLayer, *args: object, **kwargs: object) -> object:
        calls[mode] += self.training
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", count)
    for mode in calls:
        train(config(steps=4, gradient_checkpointing=mode == "again"), dataset.path, None, tmp_path / mode)
    assert losses(tmp_path / "keep") == losses(tmp_path / "again")
    models = [(tmp_path / mode / "model/model.safetensors").read_bytes() for mode in calls]
    assert models[0] == models[1]
    assert calls["again"] == calls["keep"] + 4 * 2  # steps, layers


def test_the_gradient_is_clipped_as_a_whole_and_the_norm_before_is_reported(
    dataset: kdata.Dataset, tmp_path: Path
) -> None:
    """AdamW's first moment after one step is 0.1 of the gradient."""
    norms = {}
    for clip in (0.0, 0.05, 1e9):
        out = tmp_path / str(clip)
        train(config(steps=1, warmup_steps=0, clip_norm=clip), dataset.path, None, out)
        tensors = load_file(next(out.glob("checkpoints/*/tensors.safetensors")))
        moments = [t.double() for n, t in tensors.items() if n.startswith("exp_avg.")]
        norms[clip] = 10 * float(torch.sqrt(sum(((m * m).sum() for m in moments), torch.zeros(()))))
        assert lines(out)[0]["grad_norm"] == pytest.approx(norms[0.0], rel=1e-4)
    assert norms[0.05] == pytest.approx(0.05, rel=1e-3) and norms[1e9] == pytest.approx(norms[0.0]) and norms[0.0] > 0.1


def test_weights_that_change_are_logged_and_resume_with_the_step(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down, up = Ramp(start=1.0, end=0.1, steps=8), Ramp(kind="cosine", start=0.0, end=0.9)
    weights = {"cross_entropy": down, "forward_kl": up}
    c = config(objective={"weights": weights}, steps=12, checkpoint_every_steps=3)
    train(c, dataset.path, None, tmp_path / "whole")
    logged = lines(tmp_path / "whole")
    assert [line["weights"]["cross_entropy"] for line in logged] == pytest.approx(
        [1 - 0.9 * min(step / 8, 1) for step in range(12)]
    )
    assert logged[0]["weights"]["forward_kl"] == 0.0 and logged[-1]["weights"]["forward_kl"] == pytest.approx(0.9)
    for line in logged:
        mix = sum(weight * line[name] for name, weight in line["weights"].items())
        assert line["loss"] == pytest.approx(mix, rel=1e-5)

    real = module._gradients

    def dying(*arguments):
        if arguments[-1] == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_gradients", dying)
        train(c, dataset.path, None, tmp_path / "cut")
    train(c, dataset.path, None, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_runtime_settings_may_change_on_resume(dataset: kdata.Dataset, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    changes = {"micro_batch_tokens": 64, "gradient_checkpointing": True, "parallel": "fsdp", "log_every_steps": 3}
    assert train(config(**changes), dataset.path, None, tmp_path / "run").steps == 20
    shutil.copytree(dataset.path, tmp_path / "elsewhere")  # data is known by its content, not by its path
    assert train(config(), tmp_path / "elsewhere", None, tmp_path / "run").steps == 20


def test_bf16_follows_float32(dataset: kdata.Dataset, whole: Path, tmp_path: Path) -> None:
    train(config(precision="bf16"), dataset.path, None, tmp_path / "run")
    for got, want in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert got[1] == pytest.approx(want[1], rel=0.02)


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"avx2": True, "avx512_bf16": False}, "fp32"), ({"amx_bf16": True}, "bf16")]
)
def test_auto_uses_bf16_if_the_processor_has_it_and_records_it(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: dict, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    settings = config(precision="auto", steps=2, warmup_steps=0, device="cpu")
    assert train(settings, dataset.path, None, tmp_path).config.precision == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    if expected == "bf16":  # another machine, another arithmetic: not a silent change in the middle of a run
        with pytest.raises(MismatchError, match="precision: 'bf16' -> 'fp32'"):
            train(settings, dataset.path, None, tmp_path)


def test_a_plan_decides_what_is_read(dataset: kdata.Dataset, tmp_path: Path) -> None:
    plan = make_plan(dataset, "few", ["doc-1", "doc-3"], method="sql", parameters={})
    path = plan.save(tmp_path / "plans")
    result = train(config(steps=4, batch_tokens=64), dataset.path, path, tmp_path / "run")
    per_epoch = LENGTHS[1] + LENGTHS[3]
    assert result.plan == "few" and result.tokens == 4 * per_epoch  # both fit one row


def test_a_plan_name_is_looked_up_in_the_dataset(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is looked up in the dataset, not in the working folder; a path or an ending means a file."""
    copy = kdata.open(shutil.copytree(dataset.path, tmp_path / "set"))
    make_plan(copy, "few", ["doc-1", "doc-3"], method="sql", parameters={}).save(copy.path / "plans")
    make_plan(copy, "few", ["doc-7"], method="sql", parameters={}).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {"steps": 1, "warmup_steps": 0, "batch_tokens": 64}
    tokens = {
        plan: train(config(**settings), copy.path, plan, tmp_path / f"run-{number}").tokens
        for number, plan in enumerate(("few", "few.parquet", "./few"))
    }
    assert tokens == {"few": LENGTHS[1] + LENGTHS[3], "few.parquet": LENGTHS[7], "./few": LENGTHS[7]}
    phases = [PhaseConfig(name="only", plan="few")]
    assert train(config(phases=phases, **settings), copy.path, None, tmp_path / "phase").tokens == tokens["few"]


def test_a_non_finite_loss_stops_before_the_weights_and_names_step_and_rows(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, poisoned = Batches.read, 17

    def read(self: Batches, *args: object, **options: object) -> Iterator[Arrays]:
        for batch in real(self, *args, **options):
            spoilt = np.where(batch.rows[batch.document] == poisoned, np.float32("nan"), batch.log_tail)
            yield dataclasses.replace(batch, log_tail=spoilt)

    monkeypatch.setattr(Batches, "read", read)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1))
    with pytest.raises(TrainingError, match=r"loss of step (\d+) is nan; rows doc-17\. ") as caught:
        train(config(steps=100), dataset.path, None, tmp_path / "run")
    assert f"step {len(steps) + 1} " in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


def test_a_gradient_that_is_not_finite_stops_too(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match=r"gradient norm of step 1 is inf; rows doc-"):
        train(config(), dataset.path, None, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 100}, "multiple of the next"),
        ({"micro_batch_tokens": 192}, "multiple of the next"),
        ({"warmup_steps": 20}, "less than steps"),
        ({"context_tokens": 128}, "max_positions"),
        ({"objective": {"temperature": 2.0}}, r"log-sum-exp only at \[1\.0\]"),
        ({"objective": {"tail": "draws"}}, "use ghost or renormalise"),
        ({"objective": {"weights": {"forward_kll": 1.0}}}, r"\['forward_kll'\] \(did you mean 'forward_kl'\?\)"),
        ({"data_order": "seed", "mixture": {"kind": "ddk"}}, "data_order=seed does not go with a mixture"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    dataset: kdata.Dataset, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(**changes), dataset.path, None, tmp_path)


def test_unknown_settings_and_long_documents_are_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        TrainConfig(learnin_rate=1.0)
    with pytest.raises(DataError, match="Documents are never cut"):
        train(config(context_tokens=32), dataset.path, None, tmp_path)


def test_every_setting_is_described() -> None:
    students, mixtures = (ScratchStudent, CheckpointStudent, PrunedStudent), (DDKMixture, FixedMixture)
    for model in (TrainConfig, PhaseConfig, ObjectiveConfig, Ramp, EvaluateConfig, *students, *mixtures):
        assert all(f.description for n, f in model.model_fields.items() if n != "kind"), model


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_the_schedule_rises_and_decays(decay: str, middle: float) -> None:
    c = config(steps=104, warmup_steps=3, decay=decay, learning_rate=1.0)
    assert learning_rate(c, 0) == 0.25 and learning_rate(c, 2) == 0.75 and learning_rate(c, 3) == 1.0
    assert learning_rate(c, 53) == pytest.approx(middle)
    assert learning_rate(c, 103) == pytest.approx(1.0 if decay == "constant" else 0.1)
