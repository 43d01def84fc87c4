"""Content for a cache, and what a cache holds."""

import hashlib
import random


class Content:
    """File content for a cache: `cache.open(*content)`."""

    def __init__(self, seed: int, num_bytes: int = 1000) -> None:
        self.data = random.Random(seed).randbytes(num_bytes)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.downloads = 0

    def __iter__(self):
        return iter((self.sha256, len(self.data), self.download))

    def download(self, file):
        self.downloads += 1
        file.seek(0)
        rest = self.data[len(file.read()) :]
        file.write(rest)
        file.flush()


def read(cache, content):
    with cache.open(*content) as file:
        return file.read()


def names(cache):
    """Return the names of the files in the cache's folder, without its lock."""
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".evict")
