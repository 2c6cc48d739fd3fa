"""What a text is, as columns: duplicates, overlap with evaluation sets, language, quality, personal data."""
