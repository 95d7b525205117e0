"""Training: recipe in, run folder out."""

from puna.train.run import Stopped, train

__all__ = ["Stopped", "train"]
