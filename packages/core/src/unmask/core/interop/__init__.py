"""Reading and writing other libraries' weights: what every domain has in common beside its names and formats."""
