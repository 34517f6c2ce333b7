"""Pillars, neighbours and the geometry that GeoMAE predicts."""
