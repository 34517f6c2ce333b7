"""Text files, tokenizers, and the batches made of them."""
