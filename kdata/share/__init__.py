"""Show and share: the card, the Hub, merge and split, other formats."""
