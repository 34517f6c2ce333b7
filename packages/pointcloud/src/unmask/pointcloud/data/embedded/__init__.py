"""The point clouds that come by name."""
