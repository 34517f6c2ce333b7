"""Weights in this library's and SST's formats, read and written."""
