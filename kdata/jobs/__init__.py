"""A teacher's beliefs into datasets, unit by unit: read, write, read again, combine, soften, score."""
