"""Megatron's distributed checkpoints to Hugging Face directories and back, without a model."""
