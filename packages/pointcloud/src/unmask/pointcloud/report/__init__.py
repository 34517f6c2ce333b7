"""The point cloud part of a run's page."""
