"""Ours against the originals, side by side in one process: `python -m benchmarks PAPER…`."""
