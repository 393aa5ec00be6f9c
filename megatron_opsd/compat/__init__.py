"""What is patched, or private and used, in Megatron, vLLM and torch. Each says for which version and why."""
