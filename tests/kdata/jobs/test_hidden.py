"""Hidden states beside a dataset: against a forward pass of transformers, through kills, damage, push and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kdata
from kdata.check.repair import repair
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, MismatchError, MissingError, StorageError, TeacherError
from kdata.jobs import hidden as job
from kdata.jobs.hidden import HiddenConfig, default_layers, plan_hidden, store_hidden
from kdata.pipelines.cli.main import app
from kdata.share.interchange.speculators import export_speculators
from kdata.share.push import push
from kdata.teachers.config import TeacherConfig
from kdata.teachers.hidden import Rebuilt, StateReader, stored_states
from tests.fakes import digests, rows_of_text, save_llama, write_jsonl

LAYERS: list[Any] = [0, 1, 2, "head"]


def settings(model: Path, **fields: Any) -> HiddenConfig:
    return HiddenConfig(model=TeacherConfig(model=str(model), backend="transformers"), **{"layers": LAYERS, **fields})


@pytest.fixture(scope="module")
def read_once(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Path:
    """A dataset that the tiny Llama read, in several shards."""
    folder = tmp_path_factory.mktemp("read")
    corpus = write_jsonl(folder / "c.jsonl", rows_of_text(9))
    config = kdata.CaptureConfig(corpus=kdata.CorpusConfig(path=str(corpus)), kind="topk", k=8, unit_tokens=60)
    return kdata.capture(folder / "dataset", config, TeacherConfig(model=str(llama_dir), backend="transformers")).path


@pytest.fixture
def dataset(read_once: Path, tmp_path: Path) -> kdata.Dataset:
    return kdata.open(shutil.copytree(read_once, tmp_path / "dataset"))


@torch.no_grad()
def oracle(model: Any, ids: np.ndarray) -> dict[Any, torch.Tensor]:
    """States of one sequence by transformers' own `output_hidden_states`, whose last entry is behind the final norm."""
    raw: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda *a: raw.append(a[2] if torch.is_tensor(a[2]) else a[2][0])
    )
    output = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True)
    handle.remove()
    first, second, head = (states[0] for states in output.hidden_states)
    return {0: first, 1: second, 2: raw[0][0], "head": head}


def test_states_are_those_of_a_forward_pass_rounded_to_bfloat16(dataset: kdata.Dataset, llama_dir: Path) -> None:
    info = store_hidden(dataset, settings(llama_dir))
    states, model = dataset.hidden("states"), AutoModelForCausalLM.from_pretrained(llama_dir)
    assert len(dataset.manifest) > 1 and set(info.files) == {
        f"hidden/states/{e.name}.safetensors" for e in dataset.manifest
    }
    for number in range(dataset.num_rows):
        ids, states_TLD = states.row(number)
        np.testing.assert_array_equal(ids, dataset[number].token_ids)
        assert states_TLD.dtype is torch.bfloat16 and states_TLD.shape == (len(ids), 4, 64)
        for layer, exact_TD in oracle(model, ids).items():
            torch.testing.assert_close(states_TLD[:, info.slot(layer)].float(), exact_TD, rtol=2**-8, atol=1e-5)
    assert verify(dataset, deep=True) == []


def test_full_distributions_are_rebuilt_exactly(dataset: kdata.Dataset, llama_dir: Path) -> None:
    """Against float64: of the state rounded to bfloat16 to float32's rounding; of the capture to bfloat16's."""
    store_hidden(dataset, settings(llama_dir, layers=["head"]))
    rebuilt = Rebuilt(dataset.hidden("states"), llama_dir)
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    weight_VD = model.lm_head.weight.detach().double()
    worst_capture = worst_rounded = 0.0
    for number in range(dataset.num_rows):
        sequence, logprobs_TV = dataset[number], rebuilt.logprobs(number)
        ids = np.asarray(sequence.token_ids)
        assert logprobs_TV[0].isnan().all() and logprobs_TV.shape == (len(ids), dataset.info.vocab_size)
        head_TD = oracle(model, ids)["head"][:-1]
        stored_TD = dataset.hidden("states").row(number)[1][:-1, 0]
        rounded_TV = torch.log_softmax(stored_TD.double() @ weight_VD.T, -1)
        exact_TV = torch.log_softmax(head_TD.double() @ weight_VD.T, -1)
        worst_rounded = max(worst_rounded, float((logprobs_TV[1:] - rounded_TV).abs().max()))
        worst_capture = max(worst_capture, float((logprobs_TV[1:] - exact_TV).abs().max()))
        actual_T = logprobs_TV[np.arange(1, len(ids)), ids[1:].astype(int)]
        bound = 2 * 2.0**-8 * float((head_TD.abs().double() @ weight_VD.abs().T).max())
        np.testing.assert_allclose(actual_T, sequence.logprob[1:], atol=bound, rtol=0.02)  # rtol: of the codec
    assert worst_rounded < 1e-4 < worst_capture


def test_another_head_is_refused(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    store_hidden(dataset, settings(llama_dir, layers=["head"]))
    with pytest.raises(MismatchError, match="another head"):
        Rebuilt(dataset.hidden("states"), save_llama(tmp_path / "other", seed=1))
    store_hidden(dataset, settings(llama_dir, layers=[1], name="one"))
    with pytest.raises(MissingError, match=r"have the layers \[1\], not 'head'"):
        Rebuilt(dataset.hidden("one"), llama_dir)


def test_float8_has_a_scale_for_each_slot(dataset: kdata.Dataset, llama_dir: Path) -> None:
    store_hidden(dataset, settings(llama_dir, name="whole"))
    store_hidden(dataset, settings(llama_dir, dtype="fp8"))
    plan = plan_hidden(dataset, settings(llama_dir, dtype="fp8"))
    assert plan.missing == 0 and plan.per_token == 4 * 64 + 4 * 4 + 4
    for number in range(dataset.num_rows):
        _, exact_TLD = dataset.hidden("whole").row(number)
        _, states_TLD = dataset.hidden("states").row(number)
        scale_TL1 = exact_TLD.float().abs().amax(-1, keepdim=True) / 448
        bound_TLD = torch.maximum(exact_TLD.float().abs() * (2**-4 + 2**-8), scale_TL1 * 2**-9)
        assert (states_TLD.dtype is torch.float32) and ((states_TLD - exact_TLD.float()).abs() <= bound_TLD).all()
    assert verify(dataset, deep=True) == []


def test_rounding_to_float8_is_within_its_bound() -> None:
    torch.manual_seed(0)
    states_TLD = torch.randn(50, 3, 64) * torch.tensor([1e-3, 1.0, 1e4])[:, None]
    stored_TLD, scales_TL1 = stored_states(states_TLD, "float8_e4m3fn")
    assert scales_TL1 is not None and scales_TL1.shape == (50, 3, 1)
    off_TLD = (stored_TLD.double() * scales_TL1.double() - states_TLD.double()).abs()
    bound_TLD = torch.maximum(states_TLD.abs() * 2**-4, scales_TL1 * 2**-10).double()
    assert (off_TLD <= bound_TLD * (1 + 1e-6)).all() and (off_TLD > bound_TLD / 4).any()


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_stopped(
    dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kdata.open(shutil.copytree(dataset.path, tmp_path / "whole"))
    store_hidden(whole, settings(llama_dir))
    read: list[int] = []
    plain = StateReader.states

    def states(self: StateReader, sequences: Any, layers: Any) -> Any:
        read.append(len(sequences))
        if len(read) == 2:
            raise Killed
        return plain(self, sequences, layers)

    monkeypatch.setattr(StateReader, "states", states)
    with pytest.raises(Killed):
        store_hidden(dataset, settings(llama_dir))
    with pytest.raises(MissingError, match="does not cover the dataset"):
        dataset.hidden("states")
    assert verify(kdata.open(dataset.path)) == [], "what is written so far belongs to it"
    store_hidden(dataset, settings(llama_dir))
    assert len(read) == 1 + len(dataset.manifest)
    assert digests(dataset.path / "hidden") == digests(whole.path / "hidden")
    with pytest.raises(MismatchError, match="other settings"):
        store_hidden(dataset, settings(llama_dir, layers=[1]))


@pytest.mark.parametrize("damage", ["flip", "gone", "json"])
def test_damage_is_seen_and_one_part_is_written_again(dataset: kdata.Dataset, llama_dir: Path, damage: str) -> None:
    store_hidden(dataset, settings(llama_dir))
    before = digests(dataset.path / "hidden")
    place = dataset.path / "hidden/states" / f"{dataset.manifest[1].name}.safetensors"
    if damage == "gone":
        place.unlink()
    else:
        place = place.parent.with_suffix(".json") if damage == "json" else place
        content = bytearray(place.read_bytes())
        content[len(content) // 2] ^= 1
        place.write_bytes(content)
    [problem] = verify(dataset)
    assert problem.path == place.relative_to(dataset.path).as_posix()
    with pytest.raises(CorruptError):
        dataset.hidden("states").row(dataset.num_rows // 2)
    done = repair(dataset.path)
    assert done.remaining == [] and any("kdata hidden" in line for line in done.commands)
    assert verify(kdata.open(dataset.path)) == []
    store_hidden(kdata.open(dataset.path), settings(llama_dir))
    assert digests(dataset.path / "hidden") == before


def test_a_part_of_another_shard_is_not_read(dataset: kdata.Dataset, llama_dir: Path) -> None:
    """A stranger who fits the digests too."""
    from kdata.format.files import file_info
    from kdata.store.hidden import load_hidden_info, write_hidden_info

    store_hidden(dataset, settings(llama_dir))
    one, two = (f"hidden/states/{entry.name}.safetensors" for entry in dataset.manifest[:2])
    shutil.copyfile(dataset.path / one, dataset.path / two)
    info = load_hidden_info(dataset, "states")
    files = {**info.files, two: file_info(dataset.path / two)}
    write_hidden_info(dataset.path, info.model_copy(update={"files": files}))
    assert [problem.path for problem in verify(dataset)] == [two]
    with pytest.raises(CorruptError, match="of another shard"):
        dataset.hidden("states").row(dataset.manifest[0].rows)


def test_a_disk_that_is_too_small_ends_it_before_the_model_is_loaded(
    dataset: kdata.Dataset, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(dataset.path)
    plan = plan_hidden(dataset, settings(llama_dir))
    assert plan.per_token == 4 * 64 * 2 + 4 and plan.total == plan.missing == plan.per_token * dataset.num_tokens
    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: usage._replace(free=plan.total - 1))
    monkeypatch.setattr(StateReader, "__init__", None)
    with pytest.raises(StorageError, match=f"{plan.per_token:,} bytes a token.* store fp8"):
        store_hidden(dataset, settings(llama_dir))
    assert not (dataset.path / "hidden").exists()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"layers": [3]}, "layer 3: name 0 to 2 or head"),
        ({"layers": [1, 1]}, "layer 1: .* each once"),
        ({"layers": [-1]}, "layer -1"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    dataset: kdata.Dataset, llama_dir: Path, fields: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        store_hidden(dataset, settings(llama_dir, **fields))
    served = HiddenConfig(model=TeacherConfig(model=str(llama_dir), backend="vllm"), layers=[1])
    with pytest.raises(ConfigError, match="backend transformers"):
        store_hidden(dataset, served)


def test_states_that_are_not_finite_are_refused(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    shutil.copytree(llama_dir, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(TeacherError):
        store_hidden(dataset, settings(tmp_path / "broken"))
    assert list((dataset.path / "hidden").rglob("*.safetensors*")) == []


def test_the_default_layers_are_those_of_speculators() -> None:
    assert default_layers(32) == [2, 16, 29, 32, "head"] and default_layers(2) == [1, 2, "head"]


def test_push_leaves_hidden_states_out_unless_asked(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    store_hidden(dataset, settings(llama_dir))
    push(dataset, tmp_path / "small")
    assert not (tmp_path / "small/hidden").exists() and verify(kdata.open(tmp_path / "small")) == []
    push(dataset, tmp_path / "large", hidden=True)
    assert digests(tmp_path / "large/hidden") == digests(dataset.path / "hidden")
    copy = kdata.open(tmp_path / "large")
    assert torch.equal(copy.hidden("states").row(0)[1], dataset.hidden("states").row(0)[1])


def test_merged_and_cut_datasets_have_none(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    store_hidden(dataset, settings(llama_dir))
    part = kdata.head(dataset, tmp_path / "head", 3)
    assert not (part.path / "hidden").exists()
    shutil.copytree(dataset.path / "hidden", part.path / "hidden")
    with pytest.raises(MissingError, match="does not cover the dataset"):
        part.hidden("states")


def test_states_at_a_url_are_copied_and_compared(
    dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.bucket  # noqa: F401

    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    store_hidden(dataset, settings(llama_dir))
    there = kdata.open(f"bucket://{dataset.path}")
    assert torch.equal(there.hidden("states").row(4)[1], dataset.hidden("states").row(4)[1])
    place = dataset.path / "hidden/states" / f"{dataset.manifest[0].name}.safetensors"
    place.write_bytes(place.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptError):
        kdata.open(f"bucket://{dataset.path}").hidden("states").row(0)


# ------------------------------------------------------------------------------------------------- speculators


def as_speculators_reads(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """Restated from vllm-project/speculators c05b95b, train/data.py: ArrowDataset._get_raw_data with FileTransfer."""
    from datasets import load_from_disk
    from safetensors.torch import load_file

    data = load_from_disk(str(folder))
    loaded = load_file(folder / "hidden_states" / f"hs_{index}.safetensors")
    if "hidden_states_scales" in loaded:  # hs_connectors/fp8_utils.py at 6494c99: dequantize_fp8_tensor
        scale = loaded["hidden_states_scales"]
        loaded["hidden_states"] = loaded["hidden_states"].to(torch.bfloat16) * scale.to(torch.bfloat16)
    assert torch.equal(loaded["token_ids"], data[index]["input_ids"])
    assert list(data.with_format(None)["seq_len"])[index] == len(loaded["token_ids"])
    return {
        "hidden_states": loaded["hidden_states"][:, :-1].flatten(1),
        "input_ids": loaded["token_ids"],
        "verifier_last_hidden_states": loaded["hidden_states"][:, -1],
        "loss_mask": data[index]["loss_mask"],
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_speculators_reads_the_export(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path, dtype: str) -> None:
    store_hidden(dataset, settings(llama_dir, dtype=dtype))
    lines = export_speculators(dataset, "states", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    tolerance = {"rtol": 2**-7, "atol": 1e-5} if dtype == "bf16" else {"rtol": 2**-3, "atol": 0.02}
    for number in range(dataset.num_rows):
        sample, exact = as_speculators_reads(tmp_path / "out", number), oracle(model, dataset[number].token_ids)
        assert sample["loss_mask"].tolist() == dataset[number].target_mask.astype(int).tolist()
        torch.testing.assert_close(sample["hidden_states"].float(), torch.cat([exact[0], exact[1]], -1), **tolerance)
        last_TD = sample["verifier_last_hidden_states"]
        torch.testing.assert_close(last_TD.float(), exact[2], **tolerance)
        # core.py applies the model's own norm and head to them
        with torch.no_grad():
            logits_TV = model.lm_head(model.model.norm(last_TD.float()))
            wanted_TV = model.lm_head(exact["head"])
        assert (torch.softmax(logits_TV, -1) - torch.softmax(wanted_TV, -1)).abs().max() < (
            0.05 if dtype == "bf16" else 0.4
        )
    counts = torch.load(tmp_path / "out/token_freq.pt", weights_only=True)
    assert sum(counts.values()) == sum(int(np.sum(row.target_mask)) for row in dataset)
    page = (tmp_path / "out/README.md").read_text()
    assert all(line in page for line in lines) and "--target-layer-ids 0 1" in page


def test_an_export_without_the_last_layer_is_refused(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    store_hidden(dataset, settings(llama_dir, layers=[1, "head"]))
    with pytest.raises(MissingError, match="needs layer 2, the model's last"):
        export_speculators(dataset, "states", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_plans_stores_and_exports(dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    call = ["hidden", str(dataset.path), "--teacher", str(llama_dir), "--layers", "1,2,head"]
    printed = CliRunner().invoke(app, [*call, "--dry-run"])
    assert printed.exit_code == 0 and "388 bytes a token" in printed.output and not (dataset.path / "hidden").exists()
    assert CliRunner().invoke(app, call).exit_code == 0
    about = json.loads((dataset.path / "hidden/states.json").read_text())
    assert about["layers"] == [1, 2, "head"] and len(about["head_digest"]) == 64
    export = ["export", str(dataset.path), str(tmp_path / "out"), "--format", "speculators", "--hidden", "states"]
    printed = CliRunner().invoke(app, export)
    assert printed.exit_code == 0 and "not in it" in printed.output and (tmp_path / "out/hidden_states").is_dir()
    assert "Saving the dataset" not in printed.output, "the library's own progress bar"
    other = CliRunner().invoke(app, [*call, "--set", "dtype=fp8"])
    assert other.exit_code == 1 and "still to write" not in other.output


def test_of_another_model_s_states_all_may_have_to_be_written(
    dataset: kdata.Dataset, llama_dir: Path, tmp_path: Path
) -> None:
    store_hidden(dataset, settings(llama_dir))
    elsewhere = Path(shutil.copytree(llama_dir, tmp_path / "moved"))
    plan = plan_hidden(dataset, settings(elsewhere))
    assert (plan.missing, plan.maybe_missing) == (0, plan.total) and "0 B or " in plan.lines()[1]
    assert plan_hidden(dataset, settings(llama_dir)).maybe_missing == 0
