"""The command `kdata`."""

STOPPED = "stopped; run the same command again: what it committed is kept"  # after Ctrl-C
