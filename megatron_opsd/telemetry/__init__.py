"""Where a run's numbers and messages go."""
