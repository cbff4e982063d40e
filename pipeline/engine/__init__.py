"""The training loop: DeepSpeed, one step, when to stop and what to save."""
