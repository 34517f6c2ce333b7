"""One file per task, and the measures they are made of."""
