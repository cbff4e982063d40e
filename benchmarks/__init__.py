"""One file per figure that we state; each measures both sides in the same run and writes JSON."""
