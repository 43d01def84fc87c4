"""The data plane: shards of label maps and images, written, indexed and read."""
