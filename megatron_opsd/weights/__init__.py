"""Hugging Face's names and Megatron's: weights come in, and go to the engine, in any layout."""
