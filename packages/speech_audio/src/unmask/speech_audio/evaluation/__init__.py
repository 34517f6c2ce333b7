"""What speech encoders are measured by: one module a task."""
