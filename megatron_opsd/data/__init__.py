"""Problems, prompts and responses, and the batches made of them."""
