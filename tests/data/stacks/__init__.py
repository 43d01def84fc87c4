"""Programs that train with unmodified frameworks, one process per rank, and write which samples each rank saw."""
