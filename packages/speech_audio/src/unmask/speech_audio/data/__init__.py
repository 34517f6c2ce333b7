"""Recordings: where they are, decoding and batches."""
