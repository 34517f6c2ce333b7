"""What language models are measured by: plain functions of token ids, texts, log-probabilities and rankings."""
