"""What Ray does beside a run: work on its checkpoints, never the training itself."""
