"""On-Policy Self-Distillation of Qwen3 with Megatron-Core and vLLM."""
