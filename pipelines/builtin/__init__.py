"""The teacher and the text that kdata brings, so that a run needs no download."""
