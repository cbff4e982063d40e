"""Checkpoints: one commit, written whole or not at all, verified before it is read."""
