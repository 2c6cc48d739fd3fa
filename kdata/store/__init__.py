"""One dataset, written and read, wherever it lies: a folder, the Hub, or a URL."""
