"""Reading and writing one dataset, in a folder, at a URL or on the Hub."""
