"""Kinds of sources: one file per kind, each yields `Source`s lazily and in a stable order."""
