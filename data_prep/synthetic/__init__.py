"""Synthetic clips in Something-Something style: what happens is told by motion alone."""
