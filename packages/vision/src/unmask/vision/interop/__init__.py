"""Weights of timm and transformers, read and written."""
