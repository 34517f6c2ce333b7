"""Reading and writing weights, and the tools that people already use."""
