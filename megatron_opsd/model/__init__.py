"""A Hugging Face architecture as Megatron's GPTModel, as student and as teacher, on this rank of a layout."""
