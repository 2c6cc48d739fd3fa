"""Check a dataset: verify its bytes, measure it again, repair what is damaged, audit what it leaks, and models too."""
