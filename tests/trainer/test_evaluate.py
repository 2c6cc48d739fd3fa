"""Evaluation against dense recomputation from the same model and the stored teacher."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, MissingError
from kdata.pipelines.cli.main import app
from kdata.trainer.config import CheckpointStudent, EvaluateConfig, ScratchStudent, TrainConfig
from kdata.trainer.evaluate import _first_choice, evaluate
from kdata.trainer.loader import Batch
from kdata.trainer.objectives import Targets
from kdata.trainer.samples import diversity_of
from kdata.trainer.student import build_student
from kdata.trainer.train import train
from tests.trainer.datasets import VOCAB, make_dataset, save_tokenizer

LENGTHS = [5 + (i * 11) % 30 for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> kdata.Dataset:
    return make_dataset(folder / "full", LENGTHS, kept=VOCAB)


@pytest.fixture(scope="module")
def run(folder: Path, dataset: kdata.Dataset) -> Path:
    config = TrainConfig(
        label="tiny",
        student=ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64),
        steps=15,
        batch_tokens=128,
        context_tokens=64,
        warmup_steps=2,
        learning_rate=1e-2,
    )
    train(config, dataset.path, None, folder / "run")
    return folder / "run"


def test_the_command(run: Path, dataset: kdata.Dataset, tmp_path: Path) -> None:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["evaluate", *(str(a) for a in arguments)])

    done = call(run / "model", dataset.path, "--save", tmp_path / "e.json")
    assert done.exit_code == 0, done.exception
    saved = json.loads((tmp_path / "e.json").read_text())
    overall = saved["overall"]
    for line in (
        f"NLL {overall['nll']:.3f}", f"reverse KL {overall['reverse_kl']:.3f}", f"total variation {overall['tv']:.3f}",
        f"top-5 agreement {overall['top5']:.1%}",
        f"probability loyalty {overall['loyalty']:.1%}", f"label loyalty: top-1 agreement {overall['top1']:.1%}",
        f"calibration error {overall['ece']:.2%}",
        f"perplexity {overall['ppl']:,.1f}", "tiny on held-out text",
    ):  # fmt: skip
        first, last = line.rsplit(" ", 1)
        assert (
            any(first in text and text.rstrip().endswith(last) for text in done.output.splitlines())
            or line in done.output
        )
    for who in ("student", "teacher"):
        bins = saved["calibration"][who]
        assert sum(b["tokens"] for b in bins) == overall["tokens"]
        gaps = sum(b["tokens"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / overall["tokens"]
        assert gaps == pytest.approx(overall["ece" if who == "student" else "teacher_ece"], rel=1e-6)
    for arguments, error, words in (
        ((run / "modle", dataset.path), MissingError, "is not a folder"),
        ((run / "model", dataset.path, "--save", tmp_path / "none" / "e.json"), MissingError, "it first"),
    ):
        done = call(*arguments)
        assert isinstance(done.exception, error) and words in str(done.exception) and "evaluate:" not in done.output


def test_data_that_cannot_be_measured_is_refused(run: Path, tmp_path: Path) -> None:
    long = make_dataset(tmp_path / "long", [80, 100])
    with pytest.raises(DataError, match="a document has 100 tokens, the student has 64 positions"):
        evaluate(run / "model", long.path)
    masked = make_dataset(tmp_path / "masked", LENGTHS[:6], mask_every=1)
    with pytest.raises(DataError, match=r"none of its tokens is a target .* nothing to measure"):
        evaluate(run / "model", masked.path)


def test_a_train_json_that_is_not_a_result_is_refused(run: Path, dataset: kdata.Dataset, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"train\.json is not a result of `kdata train`"):
        evaluate(tmp_path / "model", dataset.path)


def dense(model_dir: Path, dataset: kdata.Dataset) -> dict[str, np.ndarray]:
    """Every figure at every counted position, one document at a time, from full logits."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    index = dataset.index(["domain"])["domain"].to_pylist()
    names = ("domain", "nll", "kl", "rkl", "tv", "loyalty", "top1", "top5", "conf", "hit")
    figures: dict[str, list] = {k: [] for k in names}
    for row, domain in enumerate(index):
        seqs = dataset[row]
        ids, logprobs = seqs.padded()
        logits = model(torch.from_numpy(seqs.token_ids.astype(np.int64))[None]).logits[0].double()
        log_q = torch.log_softmax(logits, -1).detach().numpy()
        for t in np.flatnonzero(seqs.target_mask):
            p = np.zeros(VOCAB)
            p[ids[t]] = np.exp(logprobs[t].astype(np.float64))
            lq, q = log_q[t - 1], np.exp(log_q[t - 1])
            order = np.argsort(-lq)
            figures["domain"].append(domain)
            figures["nll"].append(-lq[seqs.token_ids[t]])
            figures["kl"].append((p * (np.log(p) - lq)).sum())
            figures["rkl"].append((q * (lq - np.log(p))).sum())
            figures["tv"].append(0.5 * np.abs(p - q).sum())
            m = (p + q) / 2
            jsd = ((p * (np.log2(p) - np.log2(m))).sum() + (q * (np.log2(q) - np.log2(m))).sum()) / 2
            figures["loyalty"].append(1 - math.sqrt(jsd))
            figures["top1"].append(order[0] == ids[t][logprobs[t].argmax()])
            figures["top5"].append(ids[t][logprobs[t].argmax()] in order[:5])
            figures["conf"].append(q.max())
            figures["hit"].append(order[0] == seqs.token_ids[t])
    return {k: np.array(v) for k, v in figures.items()}


def test_figures_equal_the_dense_ones_per_domain_and_overall(run: Path, dataset: kdata.Dataset) -> None:
    result = evaluate(run / "model", dataset.path, config=EvaluateConfig(batch_tokens=128))
    expected = dense(run / "model", dataset)
    assert set(result["domains"]) == {"code", "prose"}
    for name, figures in [*result["domains"].items(), ("overall", result["overall"])]:
        part = expected["domain"] == name if name != "overall" else np.ones(len(expected["nll"]), bool)
        assert figures["tokens"] == part.sum()
        assert figures["nll"] == pytest.approx(expected["nll"][part].mean(), rel=1e-5)
        assert figures["ppl"] == pytest.approx(math.exp(expected["nll"][part].mean()), rel=1e-4)
        # all entries are kept, so the bucket holds only what float16 rounding took: at most 1e-3 nats
        assert figures["kl"] == pytest.approx(expected["kl"][part].mean(), abs=2e-3)
        assert figures["reverse_kl"] == pytest.approx(expected["rkl"][part].mean(), abs=2e-3)
        assert figures["tv"] == pytest.approx(expected["tv"][part].mean(), abs=2e-3)
        assert figures["loyalty"] == pytest.approx(expected["loyalty"][part].mean(), abs=2e-3)
        assert figures["top1"] == pytest.approx(expected["top1"][part].mean())
        assert figures["top5"] == pytest.approx(expected["top5"][part].mean())
        bins = np.minimum((expected["conf"][part] * 15).astype(int), 14)
        gaps = [abs((expected["conf"][part] - expected["hit"][part])[bins == b].sum()) for b in range(15)]
        assert figures["ece"] == pytest.approx(sum(gaps) / part.sum(), abs=1e-3)


def test_the_teachers_own_figures_come_from_the_dataset(run: Path, dataset: kdata.Dataset) -> None:
    result = evaluate(run / "model", dataset.path)
    index = dataset.index(["domain", "nll", "num_target_tokens"]).to_pandas()
    for name, part in index.groupby("domain"):
        weighted = np.average(part["nll"], weights=part["num_target_tokens"])
        assert result["domains"][name]["teacher_nll"] == pytest.approx(weighted, rel=1e-3)
    assert result["overall"]["teacher_nll"] < result["overall"]["nll"]
    assert 0 <= result["overall"]["teacher_ece"] < 0.15


def test_fewer_kept_entries_bound_the_divergence_from_below(folder: Path, run: Path, dataset: kdata.Dataset) -> None:
    sparse = make_dataset(folder / "sparse", LENGTHS, kept=4)
    full, bound = (evaluate(run / "model", d.path)["overall"] for d in (dataset, sparse))
    assert bound["nll"] == pytest.approx(full["nll"])
    assert 0 < bound["kl"] < full["kl"] and 0 < bound["tv"] < full["tv"]
    assert 0 < bound["reverse_kl"] < full["reverse_kl"]
    assert dense(run / "model", dataset)["loyalty"].mean() < bound["loyalty"] < 1  # at most this loyal
    assert bound["acceptance"] > full["acceptance"] and bound["accepted_length"] > full["accepted_length"]


def test_draws_with_stored_entropy_estimate_the_full_divergence(
    folder: Path, run: Path, dataset: kdata.Dataset
) -> None:
    # With every id kept the weights are the distribution, so the estimate has no noise.
    draws = make_dataset(folder / "draws", LENGTHS, kept=VOCAB, tail="draws")
    result = evaluate(run / "model", draws.path)
    full = evaluate(run / "model", dataset.path)["overall"]
    assert "unbiased" in result["kl_is"]
    assert result["overall"]["kl"] == pytest.approx(full["kl"], abs=5e-3)
    assert result["overall"]["reverse_kl"] is None and result["overall"]["teacher_ece"] is None
    assert result["overall"]["tv"] is None and result["bounds_are"] is None
    assert result["overall"]["loyalty"] is None and result["acceptance_is"] is None


def test_exact_entries_beside_draws_give_bounds_that_draws_alone_cannot(
    folder: Path, run: Path, dataset: kdata.Dataset
) -> None:
    """The figures of the four exact entries with a bucket; and the teacher's calibration, whose first choice is exact."""
    mixed = make_dataset(folder / "mixed", LENGTHS, kept=VOCAB, tail="draws", exact=4)
    sparse = make_dataset(folder / "four", LENGTHS, kept=4)
    result, bound, full = (evaluate(run / "model", d.path) for d in (mixed, sparse, dataset))
    for name in ("code", "prose"):
        got, want = result["domains"][name], bound["domains"][name]
        assert got["reverse_kl"] == pytest.approx(want["reverse_kl"], abs=2e-3)
        assert got["tv"] == pytest.approx(want["tv"], abs=1e-3)
        assert got["loyalty"] == pytest.approx(want["loyalty"], abs=1e-3)
        assert got["top1"] == want["top1"] and got["nll"] == pytest.approx(want["nll"])
        assert got["teacher_ece"] == pytest.approx(full["domains"][name]["teacher_ece"], abs=2e-3)
        assert got["kl"] == pytest.approx(full["domains"][name]["kl"], abs=5e-3)  # draws stand for the whole
    assert "unbiased" in result["kl_is"] and result["bounds_are"].startswith("lower bounds: exact entries")
    assert bound["bounds_are"] == bound["kl_is"]


def test_the_result_carries_the_run_and_samples(run: Path, dataset: kdata.Dataset) -> None:
    prompts = [{"domain": "code", "prompt": "w5 w6 w7"}, {"domain": "prose", "prompt": "w9"}]
    few = EvaluateConfig(sample_tokens=5, max_documents=2)
    greedy = evaluate(run / "model", dataset.path, prompts=prompts, config=few)
    assert (greedy["label"], greedy["steps"], greedy["metrics"]) == ("tiny", 15, "run/metrics.jsonl")
    assert greedy["tokens"] > greedy["target_tokens"] > 0 and greedy["train_seconds"] > 0
    assert [s["domain"] for s in greedy["samples"]] == ["code", "prose"]
    assert all(len(s["text"].split()) <= 5 for s in greedy["samples"])
    index = dataset.index(["domain", "num_target_tokens"]).to_pandas()
    expected = index.groupby("domain")["num_target_tokens"].apply(lambda n: int(n.head(2).sum()))
    assert {n: d["tokens"] for n, d in greedy["domains"].items()} == expected.to_dict()
    warm = few.model_copy(update={"sample_temperature": 1.0, "seed": 3})
    sampled = [evaluate(run / "model", dataset.path, prompts=prompts, config=warm)["samples"] for _ in range(2)]
    assert sampled[0] == sampled[1] != greedy["samples"]
    words = [s["text"].split() for s in greedy["samples"]]
    assert greedy["diversity"] == diversity_of([[int(w[1:]) for w in text] for text in words])
    assert evaluate(run / "model", dataset.path, config=few)["diversity"] is None


def test_distinct_n_grams_by_hand() -> None:
    """Seven tokens, four of them different; five pairs inside of the texts, four of them different."""
    assert diversity_of([[5, 6, 5, 6], [5, 7, 8]]) == {"distinct1": 4 / 7, "distinct2": 4 / 5, "tokens": 7}
    assert diversity_of([[5], [5]]) == {"distinct1": 1 / 2, "distinct2": None, "tokens": 2}
    assert diversity_of([[]]) == {"distinct1": None, "distinct2": None, "tokens": 0}


def test_the_teachers_first_choice_is_its_first_exact_entry_even_under_heavier_draws() -> None:
    targets = Targets(
        token_ids_C=torch.tensor([0, 0]),
        ids_CK=torch.tensor([[3, 4, 5], [6, 7, -1]]),
        logprobs_CK=torch.tensor([[0.2, 0.1, 0.7], [0.3, 0.7, 0.0]]).log(),
        log_tail_C=torch.zeros(2),
        num_exact_C=torch.tensor([2, 0]),
    )
    batch = cast(Batch, SimpleNamespace(targets=targets))
    ids_M, weights_M = _first_choice(batch)
    assert ids_M.tolist() == [3, 7]
    np.testing.assert_allclose(weights_M, [0.2, 0.7], rtol=1e-6)


def test_wrong_or_missing_models_are_refused(folder: Path, dataset: kdata.Dataset) -> None:
    with pytest.raises(MissingError, match="is not a folder"):
        evaluate(folder / "nowhere", dataset.path)
    other = make_dataset(folder / "other", [8, 9], vocab=VOCAB - 1)
    model = build_student(ScratchStudent(hidden_size=16, num_layers=1, num_heads=2), other, 0)
    model.save_pretrained(folder / "alien" / "model")
    with pytest.raises(MismatchError, match="vocabulary"):
        evaluate(folder / "alien" / "model", dataset.path)


def test_a_model_that_would_be_measured_wrongly_is_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """Logits that are not head @ hidden: the loss would leave the scale out."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    config = CohereConfig(**sizes, **special, num_attention_heads=2, logit_scale=0.25, initializer_range=0.5)
    CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="logits are not head @ hidden"):
        evaluate(tmp_path, dataset.path)


def test_a_model_with_a_permuted_vocabulary_is_refused_and_one_with_other_flags_is_not(
    run: Path, dataset: kdata.Dataset, tmp_path: Path
) -> None:
    """`train` and `evaluate` agree on both."""
    state = json.loads((run / "model/tokenizer.json").read_text())
    student = TrainConfig(
        student=CheckpointStudent(model=str(tmp_path / "model")),
        steps=1,
        batch_tokens=64,
        context_tokens=64,
        warmup_steps=0,
    )

    def save(name: str, change: dict[str, Any]) -> Path:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(run / "model", tmp_path / "model")
        (tmp_path / "model/tokenizer.json").write_text(json.dumps({**state, **change}))
        return tmp_path / "model"

    flags = [{**token, "rstrip": not token["rstrip"]} for token in state["added_tokens"]]
    folder = save("flags", {"added_tokens": flags})
    assert evaluate(folder, dataset.path)["overall"] == evaluate(run / "model", dataset.path)["overall"]
    train(student, dataset.path, None, tmp_path / "trained")
    vocab = {**state["model"]["vocab"], "w7": 8, "w8": 7}
    folder = save("permuted", {"model": {**state["model"], "vocab": vocab}})
    for refused in (lambda: evaluate(folder, dataset.path), lambda: train(student, dataset.path, None, tmp_path / "t")):
        with pytest.raises(MismatchError, match="id 7 is 'w7' in one and 'w8' in the other"):
            refused()


def test_bad_input_is_named_in_one_line_and_nothing_is_saved(run: Path, dataset: kdata.Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(run / "model", tmp_path / "foreign")
    save_tokenizer(tmp_path / "foreign", VOCAB - 1)  # as many rows in the head, other tokens behind the ids
    for model, data, settings, error, message in (
        (run / "model", tmp_path / "nowhere", [], MissingError, "nowhere does not exist"),
        (run / "model", tmp_path / "empty", [], MissingError, "empty"),
        (tmp_path / "nowhere", dataset.path, [], MissingError, "is not a folder; name "),
        (tmp_path / "empty", dataset.path, [], MissingError, "does not hold a model that loads"),
        (
            tmp_path / "foreign",
            dataset.path,
            [],
            MismatchError,
            "tokenizers of .* and the model .*foreign .* are not the same",
        ),
        (run / "model", dataset.path, ["--set", "batch_token=64"], ConfigError, "did you mean 'batch_tokens'"),
    ):
        command = ["evaluate", str(model), str(data), "--save", str(tmp_path / "e.json"), *settings]
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, error), done.exception
        assert re.search(message, str(done.exception)) and not (tmp_path / "e.json").exists()
        assert len(str(done.exception).splitlines()) == 1
