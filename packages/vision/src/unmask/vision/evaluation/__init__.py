"""What image encoders are measured by: one module a task."""
