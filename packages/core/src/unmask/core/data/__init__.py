"""What the data of every domain share: splits, shards and the sets that come by name."""
