"""What language adds to a run's page."""
