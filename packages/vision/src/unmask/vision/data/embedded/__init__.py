"""The image sets that come by name."""
