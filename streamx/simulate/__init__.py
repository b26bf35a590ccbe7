"""Synthetic atlases of any size: cells drawn one by one from (seed, batch, row), so that nothing is held."""
