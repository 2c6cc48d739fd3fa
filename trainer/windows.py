"""SinKD and span correlation: positions of one document that lie close together, compared with each other.

Both are of pairs of positions. A window is `compared_tokens` consecutive tokens of a document, counted from its first token,
so what is compared follows from the document alone, and the positions that count: not from how documents are packed, and not
from micro-batches, ranks or the chunks of `kdata.trainer.fused`, which end where windows end.

SinKD: W_ij is the sum of the absolute differences of the student's probabilities at position i and the teacher's at position
j, K = exp(-W / 0.1), and P is K after 20 times dividing rows and then columns by their sums. The value at position j is
sum_i P_ij W_ij.

Source: Sinkhorn Distance Minimization for Knowledge Distillation, COLING 2024, and the authors' code (2018cx/SinKD, loss.py),
read there: constants, order of the two divisions, and the gradient through P as well as W. It compares the samples of a batch
at T = 2 and adds 0.001 sum(P W). Windows, and the mean over positions in place of the sum, are ours: with windows of n
positions the authors' 0.001 is a weight of 0.001 n.

Span correlation: DAC-KL, arXiv 2407.10068, of which we read the abstract and summaries: products of the probabilities of
adjacent positions inside a span, which are to be the teacher's. Of the joint distribution of two adjacent positions, p_t(v)
p_t+1(w), these pairs are compared: the two actual tokens, and v = w for each id that is kept at both. The squared error and
windows for spans (there they are phrases) are our defaults.

Shapes: C positions, G windows, N places of a window, K kept entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SINKHORN_EPSILON, SINKHORN_ROUNDS = 0.1, 20  # of SinKD's authors


class Windows(NamedTuple):
    """Positions by windows. place_GN: int64 [G, N], the position at each place, -1 where none counts; N is the number of
    positions of the largest window. window_C, at_C: int64 [C], window and place of each position. counts_C: bool [C]."""

    place_GN: Tensor
    window_C: Tensor
    at_C: Tensor
    counts_C: Tensor

    def of_all(self, values_CK: Tensor, fill: float) -> Tensor:
        """[C, N, K]: at each position the values of every place of its window, `fill` where there is none."""
        values_GNK = values_CK[self.place_GN.clamp_min(0)].masked_fill((self.place_GN < 0)[..., None], fill)
        return values_GNK[self.window_C]


def begins_of(document_C: Tensor, position_C: Tensor, compared_tokens: int) -> Tensor:
    """Which positions are the first of their window, bool [C].

    Args:
        document_C: int64 [C], rising. position_C: int64 [C], place of the token in its document, rising within one.
    """
    key_2C = torch.stack([document_C, position_C // compared_tokens])
    begins_C = torch.ones_like(document_C, dtype=torch.bool)
    begins_C[1:] = (key_2C[:, 1:] != key_2C[:, :-1]).any(0)
    return begins_C


def follows(document_C: Tensor, position_C: Tensor, counts_C: Tensor, compared_tokens: int) -> Tensor:
    """Which positions are compared with the one before, bool [C]: of the token before, in the same window; both count.

    Args: see `windows_of`.
    """
    follows_C = torch.zeros_like(counts_C)
    is_next_C = (position_C.diff() == 1) & ~begins_of(document_C, position_C, compared_tokens)[1:]
    follows_C[1:] = is_next_C & counts_C[1:] & counts_C[:-1]
    return follows_C


def windows_of(document_C: Tensor, position_C: Tensor, counts_C: Tensor, compared_tokens: int) -> Windows:
    """The windows of some positions.

    Args:
        document_C, position_C: see `begins_of`.
        counts_C: bool [C], which positions are compared.
    """
    begins_C = begins_of(document_C, position_C, compared_tokens)
    window_C, first_G = begins_C.cumsum(0) - 1, begins_C.nonzero()[:, 0]
    at_C = torch.arange(len(window_C), device=window_C.device) - first_G[window_C]
    place_GN = window_C.new_full((len(first_G), int(at_C.max()) + 1 if len(at_C) else 0), -1)
    own_C = counts_C.nonzero()[:, 0]
    place_GN[window_C[own_C], at_C[own_C]] = own_C
    return Windows(place_GN, window_C, at_C, counts_C)


def distances(q_CNK: Tensor, p_CNJ: Tensor) -> Tensor:
    """W of the student at each position and the teacher at each place of its window, [C, N].

    Args:
        q_CNK: the student's probabilities of the teacher's entries there, 0 where it has none.
        p_CNJ: the teacher's of these entries and, last, of everything else, which is one item: so W is a lower bound of that
            over the vocabulary, and equal to it where all is kept.
    """
    rest_CN = 1 - q_CNK.sum(-1)
    return (q_CNK - p_CNJ[..., :-1]).abs().sum(-1) + (rest_CN - p_CNJ[..., -1]).abs()


def transported(distance_CN: Tensor, windows: Windows) -> Tensor:
    """sum_i P_ij W_ij of each position j, [C]; 0 where it does not count."""
    live_GN = windows.place_GN >= 0
    distance_GNN = distance_CN[windows.place_GN.clamp_min(0)]
    plan_GNN = (-distance_GNN / SINKHORN_EPSILON).exp() * (live_GN[:, :, None] & live_GN[:, None, :])
    for _ in range(SINKHORN_ROUNDS):
        for axis in (2, 1):
            sum_GNN = plan_GNN.sum(axis, keepdim=True)
            plan_GNN = plan_GNN / sum_GNN.masked_fill(sum_GNN == 0, 1.0)  # 0: a place without a position
    value_GN = (plan_GNN * distance_GNN).sum(1)
    return value_GN[windows.window_C, windows.at_C].masked_fill(~windows.counts_C, 0.0)


def shared_places(ids_PK: Tensor, next_ids_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of a position are entries of the next one too, bool [P, K], and the places of those there, int64 [P, K].

    Args:
        ids_PK, next_ids_PK: distinct within a position, but for -1, which is no entry.
    """
    sorted_PK, place_PK = next_ids_PK.sort(-1)
    at_PK = torch.searchsorted(sorted_PK, ids_PK).clamp_max(ids_PK.shape[1] - 1)
    return (sorted_PK.gather(1, at_PK) == ids_PK) & (ids_PK >= 0), place_PK.gather(1, at_PK)
