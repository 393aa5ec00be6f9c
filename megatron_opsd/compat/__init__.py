"""Patches of Megatron, vLLM and torch, and uses of their private names, each with its version and reason."""
