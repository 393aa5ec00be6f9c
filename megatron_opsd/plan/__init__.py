"""What a run will need, and what is wrong with it, before it starts."""
