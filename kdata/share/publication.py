"""The pages that go with a shared copy: card, Croissant metadata, and what was looked at before it was shared.

audit.json is a record for whoever opens the copy, not a proof: it names the content digest of the dataset that it is of, and
a card that is written later shows it only while the two agree.
"""

from __future__ import annotations

import json
from typing import Any

from kdata.check.verify import PAGES
from kdata.share.card import AUDIT, Record, card_page, cost_of, headline, licenses_of
from kdata.share.croissant import croissant_page
from kdata.share.fitness import About, fitness, refuse_unfit
from kdata.store.dataset import Dataset


def publication(dataset: Dataset, about: About) -> dict[str, bytes]:
    """Look at a dataset (`kdata.share.fitness`) and write what goes with it, as PAGES names them; nothing is published.

    Raises:
        DataError: something is against sharing it, or a text holds what looks like a secret.
        ConfigError: README.md exists and is not a card.
    """
    result = fitness(dataset, about)
    refuse_unfit(result, dataset.place)
    record: dict[str, Any] = {"dataset": dataset.content_digest, **result.as_dict()}
    card = card_page(dataset, cost=cost_of(dataset), record=Record.model_validate(record))
    pages = {
        "README.md": card,
        AUDIT: (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode(),
        "croissant.json": croissant_page(dataset, headline(dataset), licenses_of(dataset), about.url, about.languages),
    }
    assert tuple(pages) == PAGES
    return pages
