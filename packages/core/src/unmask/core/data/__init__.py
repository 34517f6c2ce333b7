"""What the data of every domain share: folders, shards, splits, damaged samples, and the sets that come by name."""
