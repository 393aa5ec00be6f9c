"""Maps Hugging Face's weight names to Megatron's: loads weights into any layout and exports them from any layout."""
