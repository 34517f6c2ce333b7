"""Labels that speech methods predict: features, clusters and label sets."""
