"""Pretraining of V-JEPA-2-style world models: loop, loader, checkpoints, probes and reports."""
