"""The pure part of snapshots: no clock, no randomness, no threads, no I/O, no Ray, no torch."""
