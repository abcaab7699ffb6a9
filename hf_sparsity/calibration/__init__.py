"""Texts, datasets, mixes and the model's own samples become the same batches every time."""
