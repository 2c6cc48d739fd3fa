"""Dense float64 references: a full [M, V] softmax, every formula written out, gradients by autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kdata.trainer.objectives import Targets

WINDOW = 3  # tokens of a window, in tests
TAID_T = 0.7  # the share of the teacher in the target of `taid`, in tests
AT_1 = ("span_correlation",)  # refused at other temperatures
# The objectives that use draws as they are.
LINEAR = ("cross_entropy", "forward_kl", "deviation_kl")


@dataclass
class Problem:
    """A tiny student and a tiny teacher that agree on nothing, and the sparse view of the teacher."""

    hidden: Tensor
    head: Tensor
    p: Tensor  # float64 [M, V], the teacher's full distribution, at the targets' temperature
    targets: Targets


def make_problem(
    num_positions: int = 7,
    hidden_size: int = 5,
    vocab_size: int = 23,
    kept: int = 6,
    *,
    ragged: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    temperature: float = 1.0,
    exact: int = 3,
) -> Problem:
    """Top-k targets of a random teacher; `ragged` pads some positions, one down to no entry at all.

    For tail draws the entries behind the first `exact` count as draws. The first four positions are of one document and the
    others of a second; in both the third position is missing.
    """
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_positions, hidden_size, generator=rng, dtype=torch.float64) * scale
    head = torch.randn(vocab_size, hidden_size, generator=rng, dtype=torch.float64)
    logits = 2 * torch.randn(num_positions, vocab_size, generator=rng, dtype=torch.float64)
    p = torch.softmax(logits / temperature, -1)
    top, ids = p.topk(kept, dim=-1)
    if ragged:
        num_kept = torch.arange(num_positions) % (kept + 1)
        pad = torch.arange(kept)[None, :] >= num_kept[:, None]
        ids, top = ids.masked_fill(pad, -1), top.masked_fill(pad, 0.0)
    tail = (1 - top.sum(-1)).clamp_min(0)
    tokens = torch.randint(0, vocab_size, (num_positions,), generator=rng)
    tokens[0] = p[0].argmax()  # one actual token among the kept entries, others where they fall
    num_exact = (ids >= 0).sum(-1).clamp_max(exact)
    entropy = torch.special.entr(torch.softmax(logits, -1)).sum(-1)
    number = torch.arange(num_positions)
    place = torch.where(number >= 4, number - 4, number)
    actual = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    targets = Targets(
        tokens, ids, top.log(), tail.log(), temperature, num_exact, entropy_C=entropy, actual_logprobs_C=actual,
        document_C=(number >= 4).long(), position_C=1 + place + (place > 1),
    )  # fmt: skip
    return Problem(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), p, targets)


def lumped(problem: Problem, tail: str) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q) over kept entries and the rest, and log q of the actual token, from the full float64 softmax.

    p and q are at the targets' temperature, the actual token's log q at 1.
    """
    targets = problem.targets
    logits = problem.hidden.double() @ problem.head.double().T
    log_q = torch.log_softmax(logits / targets.temperature, -1)
    live = targets.ids_CK >= 0
    ids = targets.ids_CK.clamp_min(0)
    q_kept = log_q.exp().gather(1, ids) * live
    is_rest = torch.ones_like(log_q).scatter_reduce(1, ids, (~live).double(), "prod")
    q = torch.cat([q_kept, (log_q.exp() * is_rest).sum(-1, keepdim=True)], -1)
    p_kept = targets.logprobs_CK.double().exp()
    p_rest = torch.zeros(len(p_kept), 1, dtype=torch.float64)
    if tail == "ghost":
        p_rest = targets.log_tail_C.double().exp()[:, None]
    elif tail == "renormalise":
        p_kept = p_kept / p_kept.sum(-1, keepdim=True).clamp_min(1e-300)
    log_q_token = torch.log_softmax(logits, -1).gather(1, targets.token_ids_C[:, None])[:, 0]
    return torch.cat([p_kept, p_rest], -1), q, log_q_token


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a log(a / b) over the last axis, with 0 log 0 = 0."""
    live = a > 0
    safe_a, safe_b = torch.where(live, a, 1.0), torch.where(live, b, 1.0)
    return (safe_a * (safe_a.log() - safe_b.log()) * live).sum(-1)


def exact_part(problem: Problem) -> Problem:
    """The same positions without their draws, whose mass goes to the tail."""
    targets = problem.targets
    drawn = torch.arange(targets.ids_CK.shape[1])[None, :] >= targets.num_exact_C[:, None]
    ids = targets.ids_CK.masked_fill(drawn, -1)
    logprobs = targets.logprobs_CK.masked_fill(drawn, -torch.inf)
    return replace(problem, targets=replace(targets, ids_CK=ids, logprobs_CK=logprobs))


def oracle_values(problem: Problem, name: str, tail: str, beta: float = 0.5, skew: float = 0.1) -> Tensor:
    """One objective at each position, differentiable in the problem's hidden states and head; divergences times T^2."""
    if tail == "draws" and name not in LINEAR and (name, beta) != ("jsd", 0.0):
        return oracle_values(exact_part(problem), name, "ghost", beta, skew)
    p, q, log_q_token = lumped(problem, tail)
    if name == "cross_entropy":
        return -log_q_token
    squared = problem.targets.temperature**2
    if name == "jsd" and 0 < beta < 1:
        m = beta * p + (1 - beta) * q
        return squared * (beta * kl(p, m) + (1 - beta) * kl(q, m))
    divergence = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: kl(p, q) if beta == 0 else kl(q, p),
        "skewed_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "total_variation": lambda: 0.5 * (p - q).abs().sum(-1),
        "balanced_kl": lambda: _balanced(p, q),
        "adaptive_kl": lambda: _adaptive(p, q),
        "tail_aware_kl": lambda: _tail_aware(p, q),
        "taid": lambda: _taid(p, q),
        "dac_kl": lambda: _dac(p, q),
        "first": lambda: _first(p, q),
        "plackett_luce": lambda: _plackett_luce(p, q, problem.targets),
        "uld": lambda: _uld(p, problem),
        "sinkd": lambda: _sinkd(p, problem),
        "span_correlation": lambda: _span_correlation(p, q, problem),
        "deviation_kl": lambda: problem.targets.entropy_C / math.log(len(problem.head)) * kl(p, q),
    }[name]()
    return squared * divergence


def _balanced(p: Tensor, q: Tensor, delta: float = 2.0) -> Tensor:
    unsure = torch.special.entr(p).sum(-1) > torch.special.entr(q).sum(-1)
    return torch.where(unsure, delta, 1.0) * kl(p, q) + torch.where(unsure, 1.0, delta) * kl(q, p)


def _adaptive(p: Tensor, q: Tensor, head: float = 0.5) -> Tensor:
    """Position by position; the last outcome is no part of the head."""
    values = []
    for p_J, q_J in zip(p, q, strict=True):
        in_head, total = [], 0.0
        for j in sorted(range(len(p_J) - 1), key=lambda j: -float(p_J[j])):
            total += float(p_J[j])
            if in_head and total > head:
                break
            in_head.append(j)
        gaps = (p_J - q_J).detach().abs()
        share = gaps[in_head].sum() / gaps.sum() if gaps.sum() > 0 else gaps.sum()
        values.append(share * kl(p_J, q_J) + (1 - share) * kl(q_J, p_J))
    return torch.stack(values)


def _tail_aware(p: Tensor, q: Tensor, weight: float = 2.0) -> Tensor:
    """From its parts: the head given that one of its entries comes, and the masses."""
    head_p, head_q = p[:, :-1].sum(-1), q[:, :-1].sum(-1)
    live = (head_p > 0)[:, None]
    inside = kl(
        torch.where(live, p[:, :-1] / torch.where(live, head_p[:, None], 1.0), 0.0),
        torch.where(live, q[:, :-1] / torch.where(live, head_q[:, None], 1.0), 0.0),
    )
    masses = [torch.stack([head, x[:, -1]], -1) for head, x in ((head_p, p), (head_q, q))]
    return head_p * inside + weight * kl(*masses)


def _taid(p: Tensor, q: Tensor) -> Tensor:
    target = torch.where(p > 0, p**TAID_T * q.detach() ** (1 - TAID_T), 0.0)
    return kl(target / target.sum(-1, keepdim=True).clamp_min(1e-300), q)


def _plackett_luce(p: Tensor, q: Tensor, targets: Targets) -> Tensor:
    """Position by position: choose the outcomes one after the other, each out of those that are left."""
    values = []
    for p_J, q_J, ids_K, token in zip(p, q, targets.ids_CK.tolist(), targets.token_ids_C.tolist(), strict=True):
        bucket = len(p_J) - 1
        own = ids_K.index(token) if token in ids_K else bucket
        kept = sorted((k for k, kept_id in enumerate(ids_K) if kept_id >= 0), key=lambda k: -float(p_J[k]))
        order = [own, *(j for j in [*kept, bucket] if j != own)]
        chosen, left = q_J[order], [q_J[order[k:]].sum() for k in range(len(order))]
        values.append(-(p_J[order] * (chosen / torch.stack(left)).log()).sum())
    return torch.stack(values)


def _uld(p: Tensor, problem: Problem) -> Tensor:
    """Both whole vocabularies sorted; behind the kept ranks only the masses."""
    logits = problem.hidden.double() @ problem.head.double().T
    values = []
    for p_J, q_V in zip(p, torch.softmax(logits / problem.targets.temperature, -1), strict=True):
        kept = [j for j in range(len(p_J) - 1) if p_J[j] > 0]
        sorted_p, sorted_q = p_J[kept].sort(descending=True)[0], q_V.sort(descending=True)[0]
        gaps = (sorted_p - sorted_q[: len(kept)]).abs().sum()
        values.append(gaps + (p_J[-1] - sorted_q[len(kept) :].sum()).abs())
    return torch.stack(values)


def windows(targets: Targets, compared_tokens: int = WINDOW) -> list[list[int]]:
    """Positions of each window, those that are not chosen left out."""
    members: dict[tuple[int, int], list[int]] = {}
    for c, (document, position) in enumerate(
        zip(targets.document_C.tolist(), targets.position_C.tolist(), strict=True)
    ):
        if targets.chosen_C is None or targets.chosen_C[c]:
            members.setdefault((document, position // compared_tokens), []).append(c)
    return list(members.values())


def source_sinkhorn(distance: Tensor) -> Tensor:
    """P W of a matrix of distances, as SinKD's authors compute it."""
    plan = torch.exp(-distance / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan * distance


def _sinkd(p: Tensor, problem: Problem) -> Tensor:
    """Window by window; the teacher's entries at each position and everything else, which the student's softmax is cut to."""
    targets = problem.targets
    q = torch.softmax(problem.hidden.double() @ problem.head.double().T / targets.temperature, -1)
    values = [q.sum() * 0] * len(targets)
    for members in windows(targets):
        rows = []
        for i in members:
            row = []
            for j in members:
                kept = [k for k in range(p.shape[1] - 1) if targets.ids_CK[j, k] >= 0]
                own = q[i, targets.ids_CK[j, kept]]
                row.append((own - p[j, kept]).abs().sum() + (1 - own.sum() - p[j, -1]).abs())
            rows.append(torch.stack(row))
        for j, value in zip(members, source_sinkhorn(torch.stack(rows)).sum(0), strict=True):
            values[j] = value
    return torch.stack(values)


def _span_correlation(p: Tensor, q: Tensor, problem: Problem) -> Tensor:
    """Position by position; a set of pairs of ids, so that none counts twice."""
    targets = problem.targets
    actual_q = torch.softmax(problem.hidden.double() @ problem.head.double().T, -1)
    values = [q.sum() * 0] * len(targets)
    for members in windows(targets):
        for a, b in pairwise(members):
            if targets.position_C[b] != targets.position_C[a] + 1:
                continue
            tokens = [int(targets.token_ids_C[c]) for c in (a, b)]
            pairs = {tuple(tokens): (
                (targets.actual_logprobs_C[a] + targets.actual_logprobs_C[b]).exp(),
                actual_q[a, tokens[0]] * actual_q[b, tokens[1]],
            )}  # fmt: skip
            entries = [{v: k for k, v in enumerate(targets.ids_CK[c].tolist()) if v >= 0} for c in (a, b)]
            for v in entries[0].keys() & entries[1].keys():
                k, m = entries[0][v], entries[1][v]
                pairs.setdefault((v, v), (p[a, k] * p[b, m], q[a, k] * q[b, m]))
            values[b] = sum((x - y) ** 2 for x, y in pairs.values())
    return torch.stack(values)


def _among(p: Tensor, q: Tensor, places: list[int]) -> Tensor:
    return kl(p[places] / p[places].sum(), q[places] / q[places].sum()) if places else q.sum() * 0


def _first(p: Tensor, q: Tensor, c: float = 1.0) -> Tensor:
    values = []
    for p_J, q_J in zip(p, q, strict=True):
        kept = [j for j in range(len(p_J) - 1) if p_J[j] > 0]
        values.append(_among((p_J / c).exp(), q_J, sorted(kept, key=lambda j: -float(p_J[j]))[:5]))
    return torch.stack(values)


def _dac(p: Tensor, q: Tensor, lower: float = 0.0, upper: float = 0.95) -> Tensor:
    values = []
    for p_J, q_J in zip(p, q, strict=True):
        left, before = [], 0.0
        for j in sorted(range(len(p_J) - 1), key=lambda j: -float(p_J[j])):
            if lower <= before < upper and p_J[j] > 0:
                left.append(j)
            before += float(p_J[j])
        values.append(_among(p_J, q_J, left))
    return torch.stack(values)
