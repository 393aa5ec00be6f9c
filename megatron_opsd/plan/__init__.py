"""Before a run starts: the memory that it will need, and the mistakes in its settings."""
