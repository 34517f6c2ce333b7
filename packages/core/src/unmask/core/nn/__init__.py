"""Parts that encoders and predictors are made of: the transformer block, positions, initialisations."""
