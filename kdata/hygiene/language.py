"""The language of a text, by py3langid (BSD-3-Clause): 97 languages, a naive Bayes model over n-grams of bytes.

The first SAMPLE characters are looked at: 0.1 to 0.3 ms a text, and on the texts of tests/benchmarks/hygiene.py the same
answers as from 1,000. lingua (Apache-2.0) took six times as long in its fast mode, and its package has 96 MB instead of 4.5.
pycld2 (Apache-2.0) is ten times as fast, but refuses texts with control characters, and gives no probability.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kdata.errors import DependencyError

SAMPLE = 500  # characters of a text
LEAST_LETTERS = 10  # of a text whose language is told


def language_of(text: str) -> tuple[str | None, float | None]:
    """Code of the language (ISO 639-1), and the model's probability of it in [0, 1].

    Both are None where the first SAMPLE characters have fewer than LEAST_LETTERS letters.
    """
    sample = text[:SAMPLE]
    if sum(map(str.isalpha, sample)) < LEAST_LETTERS:
        return None, None
    code, probability = _model().classify(sample)
    return str(code), round(float(probability), 4)


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DependencyError("the check `language` needs py3langid: pip install 'kdata[hygiene]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
