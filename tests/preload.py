"""What the processes of the crash tests need, imported once by their server; no thread may start here."""

import numpy as np
import pytest.__main__  # noqa: F401
import torch
import transformers.models.auto.tokenization_auto
import transformers.tokenization_utils_tokenizers  # noqa: F401

import kdata.format.packed as packed
import tests.fakes  # noqa: F401

torch.set_num_threads(1)
_counts, _reals = np.zeros(1, np.int32), np.zeros(0, np.float32)
packed.decode_gaps(packed.encode_gaps(_reals, _counts), _counts, np.zeros(1, np.float32))
