"""The command `kdata`."""
