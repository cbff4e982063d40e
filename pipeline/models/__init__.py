"""The networks: encoder, predictor, the teacher's average, and what they cost."""
