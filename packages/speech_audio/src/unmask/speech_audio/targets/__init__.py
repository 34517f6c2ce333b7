"""Labels that speech methods predict: features, clusters and the sets they are kept in."""
