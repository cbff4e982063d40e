"""One check a file: a function from a `Situation` to a `Finding`, or one that compares nodes."""
