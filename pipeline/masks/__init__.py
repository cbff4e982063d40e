"""Which tokens of a clip the student sees and which ones it has to predict."""
