"""Lines of text: reading them, and batches."""
