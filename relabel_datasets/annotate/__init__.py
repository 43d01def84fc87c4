"""The producer: annotators, image sources, and shards of label maps."""
