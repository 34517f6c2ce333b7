"""One method, one file; each is found by its name."""
