"""Prove a dataset whole, measure it again, set aside what is broken, look for leakage."""
