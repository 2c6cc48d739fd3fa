"""Show and share datasets: the card, copies in folders and on the Hub, merge and split, other tools' formats."""
