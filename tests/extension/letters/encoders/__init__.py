"""Networks over letters."""
