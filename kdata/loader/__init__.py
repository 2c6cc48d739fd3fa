"""Dataset and plan to packed batches, in numpy."""
