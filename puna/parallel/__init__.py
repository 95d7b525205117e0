"""Many devices: layouts, and the ways in which devices share a model, its state and its data."""
