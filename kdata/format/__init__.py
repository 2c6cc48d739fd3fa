"""The format on disk as plain data: schemas, manifest, codecs, kept entries. Nothing here opens a dataset."""
