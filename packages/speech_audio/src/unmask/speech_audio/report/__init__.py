"""The sound part of a run's page."""
