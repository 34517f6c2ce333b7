"""The image part of a run's page."""
