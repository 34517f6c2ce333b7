"""What is asked of a language model, where it is more than the tokens themselves."""
