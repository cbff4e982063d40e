"""Starting runs: on this machine, later on clusters."""
