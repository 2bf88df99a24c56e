"""Token shards: how they are made, fetched, checked and cut into batches."""
