"""Text that ships with the package, and sets that come by name."""
