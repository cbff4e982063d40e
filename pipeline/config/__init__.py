"""Configuration: strict frozen sections, YAML with a line number per key, and texts about both."""
