"""What stands on disk, as pure data: schemas, manifest, codecs, kept entries. Opens nothing by itself."""
