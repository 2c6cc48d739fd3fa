"""Checkpoints: a damaged one is refused whole or the one before it is used; two trainers cannot share a folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kdata
from kdata.errors import CorruptError, MismatchError, StorageError
from kdata.format.files import file_info, lock_of
from kdata.format.manifest import digest_of, json_bytes
from kdata.observe.progress import console
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.domain_weights import DDKMixture
from kdata.trainer.train import train
from tests.faults import FULL, Fault, Server
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 7) % 40 for i in range(60)]


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64),
        "steps": 4,
        "batch_tokens": 128,
        "context_tokens": 64,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
    }
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def stopped_once(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 2, whose checkpoint it has."""
    return stop_before(3, config(), dataset, tmp_path_factory.mktemp("stopped") / "run")


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(), dataset.path, None, out)
    return out


def newest(out: Path) -> Path:
    return max((out / "checkpoints").iterdir())


def change_state(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of state.json, with a digest that fits."""
    path = newest(out) / "state.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(json_bytes({**content, "digest": digest_of(content)}))


def change_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors, with digests that fit."""
    path = newest(out) / "tensors.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    change_state(out, lambda state: state.update(tensors=file_info(path).model_dump()))


def model_of(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def refused(dataset: kdata.Dataset, out: Path, settings: TrainConfig | None = None) -> str:
    """What training says of the damaged checkpoint; it changes no file."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(CorruptError) as caught:
        train(settings or config(), dataset.path, None, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and str(newest(out)) in text
    assert f"or remove {out / 'checkpoints'} to train from the start" in text
    return text


def test_a_flipped_bit_anywhere_is_refused(dataset: kdata.Dataset, stopped: Path) -> None:
    """No flip resumes into another model: those of the values, of the names, of the digests and of the settings."""
    rng = np.random.default_rng(0)
    for name, count in (("tensors.safetensors", 12), ("state.json", 30)):
        path = newest(stopped) / name
        original = path.read_bytes()
        for place in rng.integers(0, len(original), count):
            flipped = bytearray(original)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            assert name in refused(dataset, stopped)
        path.write_bytes(original)
    assert train(config(), dataset.path, None, stopped).steps == 4


def test_a_missing_or_cut_file_is_refused(dataset: kdata.Dataset, stopped: Path) -> None:
    for name in ("tensors.safetensors", "state.json"):
        path = newest(stopped) / name
        original = path.read_bytes()
        for content in (None, b"", original[:100]):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            assert name in refused(dataset, stopped)
        path.write_bytes(original)


EMBEDDING = "model.model.embed_tokens.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "one row": (lambda t: t.update({EMBEDDING: t[EMBEDDING][:1]}), r"F32 \[1, 16\], the student asks for F32 \[61, 16\]"),
    "float64": (lambda t: t.update({EMBEDDING: t[EMBEDDING].double()}), "is F64"),
    "missing": (lambda t: t.pop(EMBEDDING), f"has no tensor {EMBEDDING}"),
    "moment": (lambda t: t.pop("exp_avg." + EMBEDDING.removeprefix("model.")), "and not what goes with it"),
    "unknown": (lambda t: t.update({"model.other": torch.zeros(1)}), "which the student does not have"),
    "moment of one row": (
        lambda t: t.update({"exp_avg_sq.model.norm.weight": torch.zeros(1)}), r"F32 \[1\], the student asks for F32 \[16\]",
    ),
    "later step": (lambda t: t.update({"step.model.norm.weight": torch.tensor(9.0)}), "is 9.0, in a checkpoint of step 2"),
    "random state": (lambda t: t.update({"rng.cpu.0": t["rng.cpu.0"][:8]}), r"rng.cpu.0 is U8 \[8\]"),
    "random numbers": (lambda t: t.update({"rng.cpu.0": torch.full_like(t["rng.cpu.0"], 255)}), "refuses the random state"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_the_student_does_not_ask_for_is_refused(
    dataset: kdata.Dataset, stopped: Path, name: str
) -> None:
    """Digests fit: somebody wrote it. A tensor of one row would be broadcast."""
    change, message = TENSORS[name]
    change_tensors(stopped, change)
    with pytest.raises(CorruptError, match=message):
        train(config(), dataset.path, None, stopped)


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "step": (lambda s: s.update(step=9), "is of step 9, which is not that of its folder"),
    "negative step": (lambda s: s.update(step=-1), "step"),
    "progress": (lambda s: s["progress"].update(step=1), "not that of its folder or of its own counts"),
    "tokens": (lambda s: s["progress"].update(tokens=-5), "tokens"),
    "seconds": (lambda s: s["progress"].update(seconds=float("nan")), "seconds"),
    "unknown": (lambda s: s.update(other=1), "other"),
    "no data": (lambda s: s.update(data={}), "is not in its phase None"),
    "phase": (lambda s: s["data"].update(phase="other"), "is not in its phase 'other'"),
    "no loader": (lambda s: s["data"].update(loader=None), "lacks the state of the loader"),
    "epoch": (lambda s: s["data"]["loader"].update(epoch=-1), "epoch -1"),
    "text": (lambda s: s["data"]["loader"].update(epoch="1"), "epoch '1'"),
    "window": (lambda s: s["data"]["loader"].update(window=10**9), "window 1000000000"),
    "row": (lambda s: s["data"]["loader"].update(row=1.5), "row 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_out_of_range_is_refused(dataset: kdata.Dataset, stopped: Path, name: str) -> None:
    change, message = STATES[name]
    change_state(stopped, change)
    assert message in refused(dataset, stopped)


@pytest.mark.parametrize(
    "change",
    [
        {"number": -1}, {"number": "1"}, {"queues": []}, {"queues": [{"num_drawn": -1, "back": []}] * 2},
        {"queues": [{"num_drawn": 1, "back": [5]}] * 2}, {"weights": None}, {"weights": {"code": 1.0}},
        {"weights": {"code": -1.0, "prose": 2.0}}, {"num_rows": 0}, {"place": {"epoch": 0, "window": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_the_domain_weights_out_of_range_is_refused(
    dataset: kdata.Dataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = config(mixture=DDKMixture(every_steps=2))
    out = stop_before(3, settings, dataset, tmp_path / "run")
    change_state(out, lambda state: state["data"]["loader"].update(change))
    refused(dataset, out, settings)
    change_state(out, lambda state: state["data"]["mixture"].update(num_updates=-1))
    refused(dataset, out, settings)


def test_the_checkpoint_before_a_damaged_one_is_used_and_said_so(
    dataset: kdata.Dataset, whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill between the two leaves both. The damaged one is replaced when the run comes there again."""
    damaged = shutil.copytree(newest(whole), stopped / "checkpoints" / newest(whole).name)
    (Path(damaged) / "tensors.safetensors").write_bytes(b"")
    with console.capture() as printed:
        train(config(), dataset.path, None, stopped)
    line = " ".join(printed.get().split())
    assert line.startswith("warning: ") and "step-00000004/tensors.safetensors is damaged" in line
    assert "goes on from the checkpoint before it, step-00000002" in line
    assert model_of(stopped) == model_of(whole)
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["step-00000004"]


def test_no_other_checkpoint_stays(dataset: kdata.Dataset, stopped: Path) -> None:
    """What kills left: an older one, a half removed one, a half written one. Names of nine digits are newer than of eight."""
    for name in ("step-00000001", ".step-00000001.old.tmp", ".step-00000004.tmp"):
        (stopped / "checkpoints" / name).mkdir()
    stop_before(3, config(), dataset, stopped)
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["step-00000002"]
    shutil.rmtree(newest(stopped))
    (stopped / "checkpoints" / ".step-00000004.tmp").mkdir()
    train(config(steps=1), dataset.path, None, stopped)
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["step-00000001"]
    (stopped / "checkpoints" / "step-100000000").mkdir()
    assert "step-100000000" in refused_or_used(dataset, stopped)


def refused_or_used(dataset: kdata.Dataset, out: Path) -> str:
    with console.capture() as printed:
        train(config(steps=1), dataset.path, None, out)
    return "".join(printed.get().split())


def test_a_checkpoint_without_digests_is_read_and_checked(dataset: kdata.Dataset, whole: Path, stopped: Path) -> None:
    """As an older kdata wrote it."""
    path = newest(stopped) / "state.json"
    content = json.loads(path.read_text())
    for key in ("digest", "tensors"):
        del content[key]
    path.write_text(json.dumps(content, indent=1, sort_keys=True))
    train(config(), dataset.path, None, stopped)
    assert model_of(stopped) == model_of(whole)


def test_a_link_in_the_folder_is_not_followed(dataset: kdata.Dataset, tmp_path: Path) -> None:
    out, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("precious")
    (out / "checkpoints").mkdir(parents=True)
    for name in ("model", ".model.tmp", "checkpoints/.step-00000002.tmp", "train.json.tmp"):
        (out / name).symlink_to(precious / "thesis" if name.startswith("train") else precious)
    train(config(steps=2), dataset.path, None, out)
    assert [p.name for p in precious.iterdir()] == ["thesis"] and (precious / "thesis").read_text() == "precious"
    assert (out / "model" / "config.json").exists() and not (out / "model").is_symlink()


# ---------------------------------------------------------------------------------------- two at once, failing disks


def test_two_trainers_in_one_folder(dataset: kdata.Dataset, whole: Path, tmp_path: Path) -> None:
    """The second is told who holds it, and changes nothing; a killed first one does not block."""
    out = tmp_path / "run"
    script = (
        "import sys, time, kdata.trainer.train as t\n"
        "from pathlib import Path\n"
        "real = t._gradients\n"
        "def slow(*args):\n"
        "    if args[-1] == 3: print('at step 3', flush=True); time.sleep(60)\n"
        "    return real(*args)\n"
        "t._gradients = slow\n"
        "t.train(t.TrainConfig.model_validate_json(sys.argv[1]), sys.argv[2], None, Path(sys.argv[3]))\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, config().model_dump_json(), str(dataset.path), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout is not None
    while first.stdout.readline() != "at step 3\n":
        assert first.poll() is None
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(StorageError) as caught:
        train(config(), dataset.path, None, out)
    text = str(caught.value)
    assert f"{out} is being written by another process (process {first.pid} on " in text and len(text.splitlines()) == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    train(config(), dataset.path, None, out)
    assert model_of(out) == model_of(whole)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_the_lock_is_free_after_an_error(dataset: kdata.Dataset, stopped: Path) -> None:
    with pytest.raises(MismatchError):
        train(config(learning_rate=1.0), dataset.path, None, stopped)
    with lock_of(stopped):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["tests.preload", "kdata.trainer.train"]) as server:
        yield server


def train_here(settings: str, dataset: str, out: str) -> None:
    torch.set_num_threads(1)
    train(TrainConfig.model_validate_json(settings), dataset, None, Path(out))


@pytest.mark.parametrize(("how", "number"), [("from", errno.ENOSPC), ("once", errno.EIO), ("kill", 0)])
def test_training_on_a_disk_that_fails_at_each_of_its_calls(
    server: Server, dataset: kdata.Dataset, whole: Path, tmp_path: Path, how: Any, number: int
) -> None:
    arguments = [config().model_dump_json(), dataset.path]
    target = "tests.trainer.test_checkpoint:train_here"
    outcome = server.run(target, [*arguments, tmp_path / "count"], [tmp_path])
    assert outcome.state == "done", outcome.text
    for at in range(1, outcome.calls - 4, outcome.calls // 6):  # not the last ones, as the number varies by a few
        out = tmp_path / str(at)
        failed = server.run(target, [*arguments, out], [tmp_path], Fault(how, number, at, FULL))
        assert failed.state == ("killed" if how == "kill" else failed.state) and failed.is_explained is (
            how != "kill"
        ), f"call {at}: {failed.text}"
        again = server.run(target, [*arguments, out], [tmp_path])
        assert again.state == "done", again.text
        assert model_of(out) == model_of(whole) and [p.name for p in (out / "checkpoints").iterdir()] == [
            "step-00000004"
        ]
        assert {p.name for p in out.iterdir()} == {"model", "train.json", "metrics.jsonl", "checkpoints"}
        shutil.rmtree(out)
