"""Stored distributions at another temperature: p_T(i) = p_i^(1/T) / sum_j p_j^(1/T).

The sum is over the whole vocabulary and was stored at capture (`log_z`, for the temperatures that its settings name). So the
only error is the rounding of the stored log-probabilities, which is divided by T.

    exact entry   ln p_T(i) = ln p_i / T - log_z
    tail          1 - the sum of the above; not known where no entry is kept
    draw          its weight w, unbiased for p, times p_T(i) / p(i): unbiased for p_T
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kdata.errors import ConfigError
from kdata.format.kept import draw_mask, log_tail, segment_sum
from kdata.format.schema import CodecInfo
from kdata.format.sequences import Sequences


def at_temperature(sequences: Sequences, temperature: float, info: CodecInfo) -> Sequences:
    """The same sequences with entry_logprobs and log_tail at `temperature`; everything else is as stored (T = 1).

    At a position without entries log_tail is NaN: it is stored at temperature 1 alone, and follows from entries at others.

    Raises:
        ConfigError: the dataset was not captured for this temperature.
    """
    if temperature == 1.0:
        return sequences
    logprobs_N, tail_T = temper(
        sequences.num_exact,
        sequences.num_kept,
        sequences.entry_logprobs,
        sequences.draw_logprobs,
        sequences.log_tail,
        log_z_of(sequences.log_z, temperature, info),
    )
    return dataclasses.replace(sequences, entry_logprobs=logprobs_N, log_tail=tail_T)


def log_z_of(log_z: np.ndarray | None, temperature: float, info: CodecInfo) -> tuple[float, np.ndarray]:
    """A temperature with its column of log_z [T, temperatures]. Raises ConfigError where it was not stored."""
    stored = info.temperatures
    if temperature not in stored or log_z is None:
        raise ConfigError(
            f"the dataset holds no log-sum-exp at temperature {temperature} (it holds {[1.0, *stored]}); capture with "
            f"--set temperatures=[{temperature}]"
        )
    return temperature, log_z[:, stored.index(temperature)]


def temper(
    num_exact_T: np.ndarray,
    num_kept_T: np.ndarray,
    logprobs_N: np.ndarray,
    draw_logprobs_N: np.ndarray | None,
    log_tail_T: np.ndarray,
    target: tuple[float, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Kept entries of T positions at another temperature.

    Args:
        num_exact_T, num_kept_T: int32 [T], exact entries and all entries of each position.
        logprobs_N: float32 [N], as `Sequences.entry_logprobs`.
        draw_logprobs_N: float32 [N], as `Sequences.draw_logprobs`; needed where there are draws.
        log_tail_T: float32 [T], as stored; stays NaN where it is NaN, and becomes NaN where no entry is kept.
        target: from `log_z_of`.
    Returns:
        Log-probabilities (of draws log-weights) float32 [N], and log of the tail float32 [T].
    """
    temperature, log_z_T = target
    draws = draw_mask(num_exact_T, num_kept_T - num_exact_T)
    log_z_N = np.repeat(log_z_T.astype(np.float64), num_kept_T)
    stored_N = logprobs_N.astype(np.float64)
    own_N = stored_N.copy()
    if draws.any():
        assert draw_logprobs_N is not None  # stored wherever there are draws and further temperatures
        own_N[draws] = draw_logprobs_N[draws]
    tempered_N = own_N / temperature - log_z_N
    mass_T = segment_sum(np.where(draws, 0.0, np.exp(tempered_N)), num_kept_T)
    # Rounding may carry the exact entries a little above 1 where almost everything was kept.
    over_N = np.repeat(np.log(np.maximum(mass_T, 1.0)), num_kept_T)
    tempered_N = np.where(draws, tempered_N, tempered_N - over_N)
    entries_N = np.where(draws, stored_N - own_N + tempered_N, tempered_N)
    known_T = ~np.isnan(log_tail_T) & (num_kept_T > 0)
    return entries_N.astype(np.float32), np.where(known_T, log_tail(mass_T), np.float32(np.nan))
