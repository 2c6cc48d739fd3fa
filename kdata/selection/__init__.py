"""Which rows, and how often: scores, methods, plans."""
