"""The report of a run, with its plots."""
