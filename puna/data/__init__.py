"""From text to batches: corpora -> documents -> tokens (shards) -> rows -> batches.

Nothing here imports torch: a row is numpy, and whoever trains makes it a tensor.
"""
