"""Teacher hacking: does a student come closer to its teacher while it moves away from what the teacher stands for?

Gao et al., 2502.02671 (read at second hand). Each kept model of a run is measured on held-out text twice:

- proxy: KL(teacher || student), against the teacher's stored beliefs;
- golden: KL(oracle || student), against those of an oracle about the same text. Without an oracle the NLL of the text, which
  then has to be somebody else's than the teacher's. A better model than the teacher is a pseudo-oracle: what it believes
  is no truth.

Hacking is a golden whose least value lies before the last model, while the proxy falls from there on to the end. Where the
proxy rises, too, the student learns its rows by heart, which an oracle is not needed to see.

Without an oracle the paper looks for a departure of the proxy from its power law. Here log(proxy) = a - b log(step) is fitted
to the first half of the models, and each later one has a z-score: its residual, divided by the standard error of a
prediction. Which part is fitted, and that z above 3 is a departure, are our default. Below, the proxy falls faster than its
law, as after a warm-up. A learning rate that decays is a departure of its own, so read it at a constant rate.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

import kdata
from kdata.errors import ConfigError, DataError, MismatchError, MissingError
from kdata.format.schema import TeacherInfo
from kdata.selection.plan import open_plan
from kdata.store.hub import hub_errors
from kdata.store.pretrained import weights_digest
from kdata.trainer.checkpoint import step_folders
from kdata.trainer.config import MODELS, EvaluateConfig, TrainResult
from kdata.trainer.evaluate import evaluate, run_beside

FEWEST_TO_FIT = 6  # models: three of the first half leave one degree of freedom
DEPARTURE = 3.0


def hacking(
    run: Path,
    heldout: Path | str,
    *,
    oracle: Path | str | None = None,
    trained_on: Path | str | None = None,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Measure proxy and golden of every model that a run kept.

    Args:
        run: OUT of `kdata train` with `keep_models_every_steps`.
        heldout: logit dataset of the run's teacher that was not trained on.
        oracle: logit dataset of another model about the same rows; None: golden is the NLL of the text.
        trained_on: the run's dataset, for figures of it.
        config: as for `evaluate`; what is measured of each model.
    Returns:
        {"label", "proxy_is", "golden_is",
        "models": [{"step", "epochs" (null without `trained_on`), "proxy", "golden" (nats per token), "nll", "top1"}],
        "best_step": of the least golden, "golden_rise": from there to the last, "proxy_fall": likewise, "proxy_monotone":
        whether the proxy falls at each model from there on, "hacking": bool,
        "fit": null, or {"models" (number fitted), "a", "b", "z": [{"step", "z"}], "departs": whether a z is above 3},
        "data": null, or {"rows", "unique_prompts", "answers_per_prompt", "epochs", "tokens"}}.
    Raises:
        MissingError: the run kept no models, or is not finished.
        ConfigError: the run has several phases and `trained_on` is given, or the oracle's dataset is the held-out one.
        DataError: there is no oracle, and the teacher wrote the held-out text.
        MismatchError: the oracle's rows are not those of the held-out set, `trained_on` is not what was trained on, or its
            teacher is not that of the held-out set (compared by weights, wherever they are read from).
        Others: as `evaluate`.
    """
    result, folders = _models_of(run)
    own_set = kdata.open(heldout)
    _check_heldout(own_set, None if oracle is None else kdata.open(oracle))
    data = None
    if trained_on is not None:
        learned_from = kdata.open(trained_on)
        data = _data(result, learned_from)
        _check_teacher(own_set, learned_from)
    models, proxy_is, golden_is = [], "", "NLL of the held-out text"
    for step, folder in folders:
        own = evaluate(folder, heldout, config=config, label=f"step {step}")
        overall, proxy_is = own["overall"], own["kl_is"]
        golden = overall["nll"]
        if oracle is not None:
            theirs = evaluate(folder, oracle, config=config, label=f"step {step}, oracle")
            golden, golden_is = (
                theirs["overall"]["kl"],
                f"KL to {kdata.open(oracle).info.teacher.model}: {theirs['kl_is']}",
            )
        epochs = None if data is None else data["epochs"] * step / result.steps
        models.append(
            {
                "step": step,
                "epochs": epochs,
                "proxy": overall["kl"],
                "golden": golden,
                "nll": overall["nll"],
                "top1": overall["top1"],
            }
        )
    steps, proxy, golden_N = ([model[name] for model in models] for name in ("step", "proxy", "golden"))
    return {
        "label": result.label,
        "proxy_is": proxy_is,
        "golden_is": golden_is,
        "models": models,
        **verdict(steps, proxy, golden_N),
        "fit": fit_power_law(steps, proxy),
        "data": data,
    }


def verdict(steps: list[int], proxy: list[float], golden: list[float]) -> dict[str, Any]:
    """Whether golden rises from its least value on, while the proxy falls; see `hacking`."""
    best = int(np.argmin(golden))
    later = proxy[best:]
    fall = later[0] - later[-1]
    return {
        "best_step": steps[best],
        "golden_rise": golden[-1] - golden[best],
        "proxy_fall": fall,
        "proxy_monotone": all(after <= before for before, after in itertools.pairwise(later)),
        "hacking": best < len(golden) - 1 and fall > 0,
    }


def fit_power_law(steps: list[int], proxy: list[float]) -> dict[str, Any] | None:
    """log(proxy) = a - b log(step), fitted to the first half of the models, and z-scores of the others.

    z is the residual over the standard error of a prediction, s sqrt(1 + 1/n + (x - mean)^2 / Sxx).

    Returns:
        See `hacking`; None where there are fewer than 6 models, or a proxy that is not above 0.
    """
    if len(steps) < FEWEST_TO_FIT or min(proxy) <= 0:
        return None
    count = (len(steps) + 1) // 2
    x, y = np.log(np.array(steps, np.float64)), np.log(np.array(proxy, np.float64))
    early_x, early_y = x[:count], y[:count]
    slope, intercept = np.polyfit(early_x, early_y, 1)
    residuals = early_y - (intercept + slope * early_x)
    deviation = max(math.sqrt(float(residuals @ residuals) / (count - 2)), 1e-9)  # three points may lie on a line
    spread = float(((early_x - early_x.mean()) ** 2).sum())
    errors = deviation * np.sqrt(1 + 1 / count + (x[count:] - early_x.mean()) ** 2 / spread)
    z = (y[count:] - (intercept + slope * x[count:])) / errors
    return {
        "models": count,
        "a": float(intercept),
        "b": float(-slope),
        "z": [{"step": step, "z": float(value)} for step, value in zip(steps[count:], z, strict=True)],
        "departs": bool((z > DEPARTURE).any()),
    }


def _models_of(run: Path) -> tuple[TrainResult, list[tuple[int, Path]]]:
    """The run's result, and step and folder of each model, by step."""
    result = run_beside(run / "model")
    if result is None:
        raise MissingError(f"{run} has no train.json; name the folder of a finished `kdata train`")
    kept = {int(path.name.removeprefix("step-")): path for path in step_folders(run / MODELS)}
    kept = {step: path for step, path in kept.items() if step <= result.steps}  # others are of a former run
    kept[result.steps] = kept.get(result.steps, run / result.model_dir)
    if len(kept) < 2:
        raise MissingError(
            f"{run} kept only its last model, so there is no course to look at; train with --set keep_models_every_steps=50"
        )
    return result, sorted(kept.items())


def _check_heldout(heldout: kdata.Dataset, oracle: kdata.Dataset | None) -> None:
    if oracle is None:
        made_by = {s.kind for s in heldout.info.sources.values()} | {
            (s.settings.get("made_by") or {}).get("kind") for s in heldout.info.sources.values()
        }
        if "generate" in made_by:
            raise DataError(
                f"the teacher wrote the text of {heldout.place}, so its NLL says how close a student is to the teacher; name "
                "an oracle's dataset of the same rows (--oracle)"
            )
        return
    if oracle.content_digest == heldout.content_digest:
        raise ConfigError(
            f"{oracle.place} is the held-out set itself, so golden would be the proxy; name a dataset of another model about "
            f"the same rows: kdata reread {heldout.place} OUT --teacher ORACLE"
        )
    columns = ["id", "content_hash"]
    if not heldout.index(columns).equals(oracle.index(columns)):
        raise MismatchError(
            f"{oracle.place} does not have the rows of {heldout.place}; have the oracle read them: "
            f"kdata reread {heldout.place} OUT --teacher ORACLE"
        )


def _check_teacher(heldout: kdata.Dataset, trained_on: kdata.Dataset) -> None:
    theirs, ours = heldout.info.teacher, trained_on.info.teacher
    if not _is_same(theirs, ours):
        raise MismatchError(
            f"{heldout.place} holds the beliefs of {theirs.model} ({theirs.weights_hash or theirs.revision}), and the run "
            f"learned from those of {ours.model} ({ours.weights_hash or ours.revision}), so KL to the former is no proxy; "
            f"have the run's teacher read the text: kdata reread {heldout.place} OUT --teacher {ours.model}"
        )


def _is_same(one: TeacherInfo, other: TeacherInfo) -> bool:
    """Whether two teachers are one model; by name where nothing else is recorded, as of data of another tool.

    A folder is known by a digest of its files and a model of the Hub by its commit. Where there is one of each, the files of
    the commit decide, if they are on this machine.
    """
    if one.lora_hash != other.lora_hash:
        return False
    if bool(one.weights_hash) != bool(other.weights_hash) and (one.revision or other.revision):
        return _digest_of(one) == _digest_of(other)
    if one.weights_hash or one.revision or other.weights_hash or other.revision:
        return (one.weights_hash, one.revision) == (other.weights_hash, other.revision)
    return one.model == other.model


def _digest_of(teacher: TeacherInfo) -> str | None:
    """`weights_digest` of a teacher; None where its files are those of the Hub and not on this machine."""
    if teacher.weights_hash is not None:
        return teacher.weights_hash
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(teacher.model, revision=teacher.revision, local_files_only=True)
    except hub_errors():
        return None
    return weights_digest(Path(folder))


def _data(result: TrainResult, dataset: kdata.Dataset) -> dict[str, Any]:
    """Figures of the dataset that decide about hacking: prompts, answers for each, epochs."""
    if result.config.phases:
        raise ConfigError("the run has several phases, and these figures are of one dataset; leave --trained-on out")
    if dataset.content_digest != result.dataset_digest:
        raise MismatchError(
            f"{dataset.place} is not the dataset that {result.label!r} was trained on, or has changed since"
        )
    index = dataset.index(["id", "prompt", "num_tokens"])
    rows = np.arange(dataset.num_rows)
    if result.plan is not None:
        rows, _ = open_plan(dataset, result.plan).choice(dataset)
    distinct = np.unique(rows)
    ids, prompts = index["id"].to_pylist(), index["prompt"].to_pylist()
    unique = len({(prompts[row] is None, prompts[row] or ids[row]) for row in distinct.tolist()})
    tokens = int(index["num_tokens"].to_numpy()[rows].sum())
    return {
        "rows": len(distinct),
        "unique_prompts": unique,
        "answers_per_prompt": len(distinct) / max(unique, 1),
        "epochs": result.tokens / max(tokens, 1),
        "tokens": tokens,
    }
