"""How important the parts of a model are, by its activations on rows of the dataset, and a student of the best of them.

No gradients are needed. A sample is a row of the dataset; of each activation the mean of its absolute value over the row's
tokens counts, and the L2 norm over rows:

    hidden dimension    outputs of the norms of every layer; the sum over these norms
    channel             input of the down-projection
    head                input of the attention's output projection, L2 norm over the head's dimensions
    layer               1 - cosine of what goes in and what comes out, mean over the row's tokens, then over rows

The scores stand in OUT/importance.parquet, with what they were computed from and the parts that the student keeps. A run that
is resumed reads them there.

Candidates are compared by their forward KL on the first of these rows, before any training. The source trains each for a
while first, because the order changes within 300 steps or so; that is left out here, so compare candidates that are alike.

Source: Minitron (arXiv 2407.14679), scores as NVIDIA's Model Optimizer computes them. What is a sample, the mean for layers,
and the comparison of candidates are our default.

Shapes: B rows, L context, T their tokens, S documents, D hidden, I channels, H heads, E size of a head, N layers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdata.errors import CorruptError, DataError, first_line
from kdata.format.json_text import parse_object
from kdata.format.manifest import json_bytes
from kdata.format.schema import json_digest
from kdata.loader.batches import BatchesConfig
from kdata.loader.packing import identity_of
from kdata.observe.progress import Task, console
from kdata.store.dataset import Dataset
from kdata.trainer.adapters import parameters_digest
from kdata.trainer.config import PrunedStudent
from kdata.trainer.distributed import Ranks
from kdata.trainer.forward import ROWS, fitting_targets, head_of, hidden_states
from kdata.trainer.fused import measure
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objective_config import ObjectiveConfig, Tail, resolve_tail
from kdata.trainer.pruning import Kept, Scores, Sizes, largest_parts, num_weights, prune

IMPORTANCE_FILE = "importance.parquet"
METADATA = b"kdata.importance"  # key in the file's schema
BATCH_TOKENS = 4096  # of one forward pass; changes memory and speed only
FORWARD_KL = ObjectiveConfig(weights={"forward_kl": 1.0})
# Axes of the file, in its order, and the field of Scores and Kept.
AXES = {"hidden": "hidden_D", "channel": "channels_NI", "head": "heads_NH", "layer": "layers_N"}


@dataclass(frozen=True)
class Calibration:
    """The rows that scores are computed from. rows: int64, global, rising. ranks: where it is computed."""

    dataset: Dataset
    rows: np.ndarray
    seed: int
    ranks: Ranks

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest of the rows."""
        return int(self.dataset.index(["num_tokens"])["num_tokens"].to_numpy()[self.rows].max(initial=0))

    def batches(self, batch_rows: int | None = None) -> Iterator[Batch]:
        """Batches of packed documents. batch_rows: None: as many as `BATCH_TOKENS` fill."""
        longest = max(self.longest_tokens, 2)
        config = BatchesConfig(
            context_tokens=longest, batch_rows=batch_rows or max(1, BATCH_TOKENS // longest), seed=self.seed
        )
        return Loader(self.dataset, self.rows, config, elsewhere=True).epoch()


def calibration_of(
    dataset: Dataset, rows: np.ndarray | None, count: int, seed: int, ranks: Ranks | None = None
) -> Calibration:
    """Rows of a dataset to compute scores from, drawn by a seed.

    Args:
        rows: int64, global rows to draw from, repeats count once; None: all.
        count: how many; all where there are fewer.
        ranks: None: this process alone, on the CPU.
    """
    lengths_R = dataset.index(["num_tokens"])["num_tokens"].to_numpy()
    pool = np.arange(dataset.num_rows, dtype=np.int64) if rows is None else np.unique(rows)
    pool = pool[lengths_R[pool] > 0]
    order = np.argsort(np.random.PCG64([seed, len(pool)]).random_raw(len(pool)), kind="stable")
    return Calibration(dataset, np.sort(pool[order[:count]]), seed, ranks or Ranks(torch.device("cpu")))


@dataclass(frozen=True)
class Importance:
    """Scores, the parts that a student keeps, and what they come from.

    source: names, digests and numbers. losses: forward KL of each candidate, nats per token; empty without candidates.
    """

    scores: Scores
    kept: Kept
    source: dict[str, Any]
    losses: list[float]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the parts that are kept, and of what they were chosen from."""
        return json_digest([{name: part.tolist() for name, part in asdict(self.kept).items()}, self.source])

    def to_bytes(self) -> bytes:
        """The Parquet file: a row for each part of the model, what it was computed from in the schema's metadata."""
        tables = [_table(axis, getattr(self.scores, name), getattr(self.kept, name)) for axis, name in AXES.items()]
        about = {"source": self.source, "losses": self.losses, "digest": _digest(_flat(self.scores), self.losses)}
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables(tables).replace_schema_metadata({METADATA: json_bytes(about)}), sink)
        return sink.getvalue()


def importance_of(
    model: PreTrainedModel,
    config: PrunedStudent,
    sizes: list[Sizes],
    calibration: Calibration,
    file: Path | None = None,
) -> Importance:
    """Scores of a model's parts, and those that a student of the given sizes keeps. Every rank must call it.

    Every rank computes the scores, and all take those of the main rank.

    Args:
        sizes: of the candidates, checked (`kdata.trainer.pruning.refuse_unfit`); one: there is nothing to compare.
        file: OUT/importance.parquet of an earlier start, which is read where it was computed from the same; None: none.
    Raises:
        CorruptError: the file is damaged.
        ConfigError: candidates cannot be compared on this dataset, because it lacks the tail.
        DataError: nor on these rows, because no distribution is kept in them.
    """
    ranks, whole, info = calibration.ranks, Sizes.of(model.config), calibration.dataset.info
    compared = len(sizes) > 1
    tail: Tail = "ghost"
    if compared:  # before time is spent
        tail = resolve_tail(FORWARD_KL, info.tail, kind=info.codec.kind, token_map=info.codec.token_map)
    source = {
        "model": config.model,
        "model_digest": parameters_digest(model.named_parameters()),
        "dataset_digest": calibration.dataset.content_digest,
        "rows_digest": identity_of(calibration.dataset.content_digest, calibration.rows),
        "rows": len(calibration.rows),
        "seed": calibration.seed,
        "candidates": [asdict(one) for one in sizes] if compared else [],
        "candidate_tokens": config.candidate_tokens if compared else 0,
    }
    before = None if file is None else _read(file, source, whole)
    if ranks.sum(np.array([before is None])).any():
        scores = _scores(_of_main(_flat(measure_importance(model, calibration)), ranks), whole)
        losses: list[float] = []
        if compared:
            own_losses = _losses(model, scores, sizes, calibration, config.candidate_tokens, tail)
            losses = _of_main(own_losses, ranks).tolist()
    else:
        assert before is not None
        scores, losses = before
    best = int(np.argmin(losses)) if losses else 0
    for number, (one, loss) in enumerate(zip(sizes, losses, strict=bool(losses))):
        count = num_weights(model.config, one)
        about = ", ".join(f"{name} {value:,}" for name, value in asdict(one).items())
        mark = "  <- the student" if number == best else ""
        line = f"candidate {number + 1}: {about}: {count:,} parameters, forward KL {loss:.4f}{mark}"
        console.print(line, markup=False, soft_wrap=True)
    return Importance(scores, largest_parts(model.config, scores, sizes[best]), source, losses)


@torch.no_grad()
def measure_importance(model: PreTrainedModel, calibration: Calibration) -> Scores:
    """Scores of a model's parts on the rows of a calibration. The model comes back on the CPU, its weights unchanged.

    Args:
        model: of a type in `kdata.trainer.pruning.PRUNABLE`.
    """
    whole = Sizes.of(model.config)
    sums = _Sums(whole)
    was_training = model.training
    model.to(calibration.ranks.device).eval()  # type: ignore[arg-type]  # transformers wraps Module.to
    with sums.hooked(model), Task("importance", len(calibration.rows), unit="rows") as task:
        for batch in calibration.batches():
            sums.share_ST = share_of_documents(batch).to(calibration.ranks.device)
            hidden_states(model, *(ids.to(calibration.ranks.device) for ids in (batch.input_ids, batch.position_ids)))
            task.advance(len(sums.share_ST))
    model.to("cpu").train(was_training)  # type: ignore[arg-type]  # as above
    return sums.scores(len(calibration.rows))


def share_of_documents(batch: Batch) -> Tensor:
    """[S, B * L] float32: 1 / tokens of the document at each of its tokens, 0 elsewhere, so that a product is a mean."""
    segment_BL = batch.segment_ids
    number_BL = segment_BL + torch.arange(len(segment_BL))[:, None] * (int(segment_BL.max()) + 1)
    document_T = number_BL.masked_fill(segment_BL < 0, -1).flatten()
    numbers_S = document_T[document_T >= 0].unique()
    own_ST = (document_T == numbers_S[:, None]).float()
    share_ST: Tensor = own_ST / own_ST.sum(1, keepdim=True)
    return share_ST


class _Sums:
    """Squares of the mean absolute activations, and 1 - cosine of the layers, summed over documents; float64.

    share_ST: of the batch that the model reads, see `share_of_documents`.
    """

    share_ST: Tensor

    def __init__(self, sizes: Sizes) -> None:
        self.norms: dict[str, Tensor] = {}
        self.channels_NI = torch.zeros(sizes.num_layers, sizes.intermediate_size, dtype=torch.float64)
        self.heads_NH = torch.zeros(sizes.num_layers, sizes.num_heads, dtype=torch.float64)
        self.layers_N = torch.zeros(sizes.num_layers, dtype=torch.float64)

    @contextmanager
    def hooked(self, model: PreTrainedModel) -> Iterator[None]:
        """Have a model add to the sums whatever it reads."""
        hooks = []
        layers: Any = getattr(model, model.base_model_prefix).layers
        for number, layer in enumerate(layers):
            for name, module in layer.named_children():
                if name.endswith("layernorm"):
                    key = f"{number}.{name}"
                    hooks.append(module.register_forward_hook(partial(self._norm, key)))
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(partial(self._channels, number)))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(partial(self._heads, number)))
            hooks.append(layer.register_forward_hook(partial(self._layer, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _squares(self, activations_BLW: Tensor) -> Tensor:
        """[W] float64, on the CPU."""
        mean_SW = self.share_ST @ activations_BLW.flatten(0, 1).abs().float()
        return mean_SW.double().square().sum(0).cpu()

    def _norm(self, key: str, module: nn.Module, inputs: Any, output_BLD: Tensor) -> None:
        self.norms[key] = self.norms.get(key, 0) + self._squares(output_BLD)

    def _channels(self, number: int, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.channels_NI[number] += self._squares(inputs[0])

    def _heads(self, number: int, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.heads_NH[number] += self._squares(inputs[0]).view(self.heads_NH.shape[1], -1).sum(-1)

    def _layer(self, number: int, module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        after_BLD: Tensor = output if isinstance(output, Tensor) else output[0]
        cosine_BL = nn.functional.cosine_similarity(inputs[0].float(), after_BLD.float(), dim=-1)
        self.layers_N[number] += (self.share_ST @ (1 - cosine_BL.flatten())).double().sum().cpu()

    def scores(self, documents: int) -> Scores:
        hidden_D = torch.stack([squares.sqrt() for squares in self.norms.values()]).sum(0)
        return Scores(
            hidden_D.numpy(), self.channels_NI.sqrt().numpy(), self.heads_NH.sqrt().numpy(),
            (self.layers_N / documents).numpy(),
        )  # fmt: skip


@torch.no_grad()
def _losses(
    model: PreTrainedModel, scores: Scores, sizes: list[Sizes], calibration: Calibration, tokens: int, tail: Tail
) -> np.ndarray:
    """Forward KL of each candidate before training, nats per token, float64, on rows with at least so many targets."""
    device = calibration.ranks.device
    batches, weight = [], 0.0
    for batch in calibration.batches(batch_rows=1):
        batches.append(batch)
        weight += batch.targets.chosen_weight
        if weight >= tokens:
            break
    if not weight:
        raise DataError(
            f"{calibration.dataset.place} keeps no distribution in the {len(calibration.rows):,} rows that candidates are "
            "compared on; raise student.importance_rows, or give one size without candidates"
        )
    losses = []
    for one in sizes:
        candidate = prune(model, largest_parts(model.config, scores, one)).to(device).eval()  # type: ignore[arg-type]
        setattr(candidate, ROWS, getattr(model, ROWS, None))
        total = 0.0
        for batch in batches:
            hidden_BLD = hidden_states(candidate, batch.input_ids.to(device), batch.position_ids.to(device))
            hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, batch.predictor_M.to(device))
            targets = fitting_targets(candidate, batch.targets).to(device)
            measured = measure(hidden_MD, head_of(candidate), targets, ("forward_kl",), tail)
            total += float(targets.sums(measured.values_MO.double())[0])
        losses.append(total / weight)
    return np.array(losses)


def _flat(scores: Scores) -> np.ndarray:
    """All scores in the order of the file, float64."""
    return np.concatenate([getattr(scores, name).ravel() for name in AXES.values()])


def _scores(flat: np.ndarray, sizes: Sizes) -> Scores:
    """The reverse of `_flat`."""
    shapes = [
        (sizes.hidden_size,), (sizes.num_layers, sizes.intermediate_size), (sizes.num_layers, sizes.num_heads),
        (sizes.num_layers,),
    ]  # fmt: skip
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return Scores(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))


def _of_main(values: np.ndarray, ranks: Ranks) -> np.ndarray:
    """The main rank's float64 numbers, on every rank: theirs may differ in the last bits, and with them what is kept."""
    return np.frombuffer(ranks.gather(np.frombuffer(values.tobytes(), np.uint8).copy())[0].tobytes(), np.float64)


def _table(axis: str, scores: np.ndarray, kept: np.ndarray) -> pa.Table:
    """Rows of one axis: one for each index, and where layers differ for each layer and index."""
    is_kept = np.zeros(scores.shape, bool)
    np.put_along_axis(is_kept, kept, True, axis=-1)
    *layer, index = np.indices(scores.shape)
    return pa.table(
        {
            "axis": pa.array([axis] * scores.size, pa.string()),
            "layer": pa.array(layer[0].ravel(), pa.int32()) if layer else pa.nulls(scores.size, pa.int32()),
            "index": pa.array(index.ravel(), pa.int32()),
            "score": pa.array(scores.ravel(), pa.float64()),
            "kept": pa.array(is_kept.ravel(), pa.bool_()),
        }
    )


def _digest(flat: np.ndarray, losses: list[float]) -> str:
    return json_digest([flat.tolist(), losses])


def _read(path: Path, source: dict[str, Any], sizes: Sizes) -> tuple[Scores, list[float]] | None:
    """Scores and losses in a file; None if there is no file, or it was computed from something else."""
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        about = parse_object(table.schema.metadata[METADATA])
        own, losses, digest = about["source"], [float(loss) for loss in about["losses"]], about["digest"]
        if table.schema.field("score").type != pa.float64() or len(losses) != len(own["candidates"]):
            raise ValueError("a column or a list is not what it must be")
        flat = table["score"].to_numpy()
        is_whole = _digest(flat, losses) == digest
        scores = _scores(flat, sizes) if is_whole and own == source else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorruptError(f"{path} is damaged ({first_line(error)}); remove it, and it is computed again") from error
    if not is_whole:
        raise CorruptError(f"{path} is damaged: it does not match its own digest; remove it, and it is computed again")
    return None if scores is None else (scores, losses)
