"""A model's hidden states, read by the plain forward pass of transformers; and full distributions made of stored ones.

vLLM can hand out states only on a GPU (`extract_hidden_states` with a connector, vLLM 0.32), so it is not used here. Slots
and their numbers are those of `kdata.store.hidden`.

Shapes: B sequences, T tokens, L slots, D width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdata.errors import MismatchError, TeacherError
from kdata.store.hidden import HiddenStates, Slot, Width
from kdata.teachers.config import TeacherConfig
from kdata.teachers.head import head_digest, is_known, load_head
from kdata.teachers.model import as_folder, weights_folder
from kdata.teachers.transformers import TransformersTeacher
from kdata.teachers.windows import windows

MOST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class StateReader(TransformersTeacher):
    """A teacher that also gives its hidden states."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        folder = weights_folder(as_folder(config).model, self.info.revision)
        self.head_digest = head_digest(folder) if is_known(folder) else None

    @torch.inference_mode()
    def states(self, sequences: Sequence[np.ndarray], layers: list[Slot]) -> Iterator[tuple[int, torch.Tensor]]:
        """States of some sequences: their number and the states [T, L, D] in the dtype of the forward pass.

        In the order of `kdata.teachers.windows`; memory is that of one window.

        Raises TeacherError where a state is not finite, or the model's layers do not hand out one state for each token.
        """
        lengths = [len(ids) for ids in sequences]
        for group in windows(lengths, self._batch_tokens, padded=True):
            states_BTLD = self._states(self._pad([sequences[i] for i in group]), layers)
            for place, number in enumerate(group):
                states_TLD = states_BTLD[place, : lengths[number]].cpu()
                if not torch.isfinite(states_TLD).all():
                    raise TeacherError(
                        f"a hidden state of sequence {number} is not finite; are the weights sound, and is model.dtype wide "
                        "enough (float16 ends at 65,504)?"
                    )
                yield number, states_TLD

    def stored(
        self, sequences: Sequence[np.ndarray], layers: list[Slot], dtype: Width
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """As `states`, as stored: the bits of the numbers, int16 or uint8 [T, L, D], and scales float32 [T, L, 1]."""
        for number, states_TLD in self.states(sequences, layers):
            stored_TLD, scales_TL1 = stored_states(states_TLD, dtype)
            bits = stored_TLD.contiguous().view(torch.int16 if dtype == "bfloat16" else torch.uint8)
            yield number, bits.numpy(), None if scales_TL1 is None else scales_TL1.numpy()

    def _states(self, ids_BT: torch.Tensor, layers: list[Slot]) -> torch.Tensor:
        decoder = self._model.get_decoder()
        blocks = _blocks(decoder, self._model.config.get_text_config().num_hidden_layers)
        kept: dict[Slot, torch.Tensor] = {}
        with ExitStack() as hooks:
            for layer in layers:
                if isinstance(layer, int):
                    handle = _hook(blocks, layer, kept)
                    hooks.callback(handle.remove)
            kept["head"] = decoder(ids_BT).last_hidden_state
        for layer in layers:
            if layer not in kept or kept[layer].shape != (*ids_BT.shape, kept["head"].shape[-1]):
                raise TeacherError(
                    f"layer {layer} of {type(self._model).__name__} hands out no state for each token; name other layers"
                )
        return torch.stack([kept[layer] for layer in layers], 2)


def _blocks(decoder: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise TeacherError(f"{type(decoder).__name__} has no list of {count} layers; its hidden states cannot be read")


def _hook(blocks: torch.nn.ModuleList, layer: int, kept: dict[Slot, torch.Tensor]) -> Any:
    """Keep what a layer adds up to: the output of the layer before, or what the first one gets."""

    def before(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept[0] = arguments[0] if arguments else named["hidden_states"]

    def after(module: Any, arguments: Any, output: Any) -> None:
        kept[layer] = output if isinstance(output, torch.Tensor) else output[0]

    if layer == 0:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[layer - 1].register_forward_hook(after)


def stored_states(states_TLD: torch.Tensor, dtype: Width) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States as they are stored: [T, L, D] of this type, and their scales float32 [T, L, 1] where it is float8.

    Rounding is to the nearest: bfloat16 is off by at most 2^-8 of the number. A scale is the largest number of a state / 448,
    so float8_e4m3fn is off by at most 2^-4 of a number, or 2^-10 of the scale where that is more.
    Source: hs_connectors/fp8_utils.py of github.com/vllm-project/speculators, which has one scale for all slots of a token;
    one for each slot broadcasts in the same way, and does not let a layer with large numbers coarsen the others.
    """
    if dtype == "bfloat16":
        return states_TLD.to(torch.bfloat16), None
    wide_TLD = states_TLD.float()
    scales_TL1 = (wide_TLD.abs().amax(-1, keepdim=True) / MOST_FP8).clamp(min=1e-12)
    return (wide_TLD / scales_TL1).to(torch.float8_e4m3fn), scales_TL1


class Rebuilt:
    """Full distributions made of stored hidden states: the stored slot `head` times the model's head, in float32.

    With bfloat16 they are what the model's head gives for the state rounded to bfloat16: exactly, but for float32's rounding.

    Args:
        states: with the slot `head`.
        model: folder or Hub name of the model that gave them; only config.json and the head are read.
    Raises:
        MissingError: the slot is not stored. MismatchError: the model has another head.
        TeacherError: the head is of no known kind.
    """

    def __init__(self, states: HiddenStates, model: str | Path, revision: str | None = None) -> None:
        self._states, self._slot = states, states.info.slot("head")
        folder = weights_folder(str(model), revision)
        if (digest := head_digest(folder)) != states.info.head_digest:
            raise MismatchError(
                f"{model} has another head (digest {digest[:12]}) than the model that gave the hidden states "
                f"{states.info.name!r} ({str(states.info.head_digest)[:12]}); name {states.info.model.model}"
            )
        self._head = load_head(folder, None, torch.float32, "cpu")

    @torch.inference_mode()
    def logprobs(self, row: int) -> torch.Tensor:
        """Log-probabilities float32 [T, V], nats; entry t is the prediction of token t, entry 0 has none (NaN)."""
        _, states_TLD = self._states.row(row)
        logits_TV = self._head.logits(states_TLD[:-1, self._slot].float())
        none_1V = torch.full((1, logits_TV.shape[-1]), torch.nan)
        return torch.cat([none_1V, torch.log_softmax(logits_TV, -1)])
