"""The command `kdata`."""

STOPPED = "stopped; the same command continues where it was"  # after Ctrl-C
