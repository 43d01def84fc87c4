"""Bytes from and to anywhere: local files, remote files, the cache, the Hub, and the output of a build."""
