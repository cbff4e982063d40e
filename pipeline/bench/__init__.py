"""Measuring: steps, attention, loader and stages of a configuration on the machine at hand."""
