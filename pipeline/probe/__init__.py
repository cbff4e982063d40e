"""Frozen evaluation: heads fitted on the tokens of an encoder that is not changed."""
