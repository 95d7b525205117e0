"""Formats of checkpoints, one module each; see `puna.checkpoint.convert`."""
