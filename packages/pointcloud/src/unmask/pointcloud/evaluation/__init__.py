"""What point cloud encoders are measured by: one module a task."""
