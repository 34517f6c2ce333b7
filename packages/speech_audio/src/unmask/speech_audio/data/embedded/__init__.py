"""The sets of sound that come by name."""
