"""Optimizers by name, behind one interface for the loop and the checkpoint.

    adamw        AdamW of torch
    muon         Muon of torch for the matrices inside of the layers, AdamW for embeddings, head, norms and biases
    adamw_8bit   AdamW of bitsandbytes, which keeps its averages in 8 bits with one scale for 256 values

A checkpoint holds, for each parameter, the tensors that the next step depends on, under their own names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdata.errors import ConfigError, DependencyError
from kdata.trainer.config import CheckpointStudent, TrainConfig
from kdata.trainer.distributed import Ranks, cut_like

# bitsandbytes keeps smaller tensors in float32.
MIN_8BIT_SIZE, BLOCK_8BIT = 4096, 256


class Optimizer:
    """One or two optimizers of torch that share the parameters of a student.

    Args:
        parts: the optimizers; each parameter that is trained is in one of them.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self._part_of = {p: part for part in parts for group in part.param_groups for p in group["params"]}

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        """Change the parameters by their gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the parameter's next step depends on, by name; empty before its first step."""
        state = self._part_of[parameter].state.get(parameter, {})
        names = self.expected(parameter) if state else {}
        values = {name: state[name] for name in names}
        return {name: v if isinstance(v, Tensor) else torch.tensor(float(v)) for name, v in values.items()}

    def expected(self, parameter: nn.Parameter) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and type of what `state_of` returns after the parameter's first step."""
        part, own = self._part_of[parameter], (list(parameter.shape), parameter.dtype)
        if isinstance(part, torch.optim.Muon):
            return {"momentum_buffer": own}
        step: tuple[list[int], torch.dtype] = ([], torch.float32)
        if isinstance(part, torch.optim.AdamW):
            return {"step": step, "exp_avg": own, "exp_avg_sq": own}
        shape, size = list(parameter.shape), parameter.numel()
        if size < MIN_8BIT_SIZE:
            return {"step": step, "state1": (shape, torch.float32), "state2": (shape, torch.float32)}
        codes, scales = (shape, torch.uint8), ([-(-size // BLOCK_8BIT)], torch.float32)
        return {"step": step, "state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}

    def restore(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_of` returned; every tensor whole, however ranks divide the parameter."""
        part: Any = self._part_of[parameter]
        state: dict[str, Any] = {
            name: cut_like(t, parameter) if list(t.shape) == list(parameter.shape) else t.to(parameter.device)
            for name, t in tensors.items()
        }
        if "absmax1" in state:
            state["qmap1"] = part.name2qmap["dynamic"] = part.name2qmap["dynamic"].to(parameter.device)
            state["qmap2"] = part.name2qmap["udynamic"] = part.name2qmap["udynamic"].to(parameter.device)
        if "state1" in state:
            state["step"] = int(state["step"])
        part.state[parameter] = state


def check_optimizer(config: TrainConfig) -> None:
    """Raise DependencyError or ConfigError where the optimizer is not installed or cannot train this kind of student."""
    if config.optimizer == "adamw_8bit":
        _bitsandbytes()
    if config.optimizer == "muon" and isinstance(config.student, CheckpointStudent) and config.student.lora is not None:
        raise ConfigError(
            "optimizer=muon does not go with student.lora: Muon makes the change of a whole weight orthogonal, and the two "
            "factors of an adapter are not such weights; use optimizer=adamw or adamw_8bit"
        )


def make_optimizer(student: PreTrainedModel, config: TrainConfig, ranks: Ranks) -> Optimizer:
    """The optimizer of the student's parameters that are trained. Weight decay acts on matrices only.

    Raises:
        ConfigError: it cannot divide its state among the ranks.
    """
    if config.optimizer != "adamw" and config.parallel == "fsdp" and ranks.world_size > 1:
        raise ConfigError(
            f"optimizer={config.optimizer} does not go with parallel=fsdp on {ranks.world_size} ranks: it cannot divide its "
            "state among them; use parallel=ddp, or optimizer=adamw"
        )
    parameters = [p for p in student.parameters() if p.requires_grad]
    hidden = _hidden_matrices(student) if config.optimizer == "muon" else set()
    rest, rates = [p for p in parameters if p not in hidden], _decay_rates(student)
    matrices = [p for p in rest if p.ndim >= 2 and p not in rates]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p not in set(matrices)], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw_8bit":
        return Optimizer(_bitsandbytes().optim.AdamW8bit(groups, lr=config.learning_rate, betas=config.betas))
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    if not hidden:
        return Optimizer(adamw)
    muon = torch.optim.Muon(
        [p for p in parameters if p in hidden],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizer(muon, adamw)


def _decay_rates(student: PreTrainedModel) -> set[nn.Parameter]:
    """The rates at which states of a state-space model fade, which Mamba's authors do not decay either: no matrices."""
    return {p for name, p in student.named_parameters() if name.rpartition(".")[2] == "A_log"}


def _hidden_matrices(student: PreTrainedModel) -> set[nn.Parameter]:
    """The matrices of the student but for embeddings and head. Raises ConfigError where there are none."""
    outer = [student.get_input_embeddings(), student.get_output_embeddings()]
    outer += [module for module in student.modules() if isinstance(module, nn.Embedding)]
    outside = {p for module in outer for p in module.parameters()} | _decay_rates(student)
    hidden = {p for p in student.parameters() if p.requires_grad and p.ndim == 2 and p not in outside}
    if not hidden:
        raise ConfigError("optimizer=muon: the student has no matrix inside of its layers; use optimizer=adamw")
    return hidden


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise DependencyError("optimizer=adamw_8bit needs bitsandbytes: pip install 'kdata[bitsandbytes]'") from error
    return bitsandbytes
