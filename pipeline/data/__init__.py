"""From shards to batches: the shard contract, the order of samples, decoding and loading."""
