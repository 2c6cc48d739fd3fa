"""Stored distributions at another temperature: p_T(i) = p_i^(1/T) / sum_j p_j^(1/T).

The sum is over the whole vocabulary and was stored at capture (`log_z`, for the temperatures that were asked for), so
nothing is approximated but the rounding of the stored log-probabilities, which shrinks by T.

    exact entry   ln p_T(i) = ln p_i / T - log_z
    tail          1 - the sum of the above
    draw          its weight w, unbiased for p, times p_T(i) / p(i): unbiased for p_T
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kdata.errors import ConfigError
from kdata.format.kept import draw_mask, segment_sum
from kdata.format.schema import CodecInfo
from kdata.format.sequences import Sequences


def at_temperature(sequences: Sequences, temperature: float, info: CodecInfo) -> Sequences:
    """The same sequences with entry_logprobs and log_tail at `temperature`; everything else is as stored (T = 1).

    Raises:
        ConfigError: the temperature was not asked for at capture.
    """
    if temperature == 1.0:
        return sequences
    known = [float(t) for t in info.parameters.get("temperatures", [])]
    if temperature not in known or sequences.log_z is None:
        raise ConfigError(
            f"the dataset holds no log-sum-exp at temperature {temperature} (it holds {[1.0, *known]}); capture with "
            f"--set temperatures=[{temperature}]"
        )
    drawn = sequences.num_kept - sequences.num_exact
    draws = draw_mask(sequences.num_exact, drawn)
    log_z_N = np.repeat(sequences.log_z[:, known.index(temperature)].astype(np.float64), sequences.num_kept)
    stored_N = sequences.entry_logprobs.astype(np.float64)
    own_N = stored_N.copy()
    if draws.any():
        assert sequences.draw_logprobs is not None  # stored wherever there are draws and further temperatures
        own_N[draws] = sequences.draw_logprobs[draws]
    tempered_N = own_N / temperature - log_z_N
    mass_T = segment_sum(np.where(draws, 0.0, np.exp(tempered_N)), sequences.num_kept)
    # Rounding may carry the exact entries a little above 1 where almost everything was kept.
    over_N = np.repeat(np.log(np.maximum(mass_T, 1.0)), sequences.num_kept)
    tempered_N = np.where(draws, tempered_N, tempered_N - over_N)
    entries_N = np.where(draws, stored_N - own_N + tempered_N, tempered_N)
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.clip(1.0 - mass_T, 0.0, 1.0))
    return dataclasses.replace(
        sequences,
        entry_logprobs=entries_N.astype(np.float32),
        log_tail=np.where(np.isnan(sequences.log_tail), np.nan, tail_T).astype(np.float32),
    )
