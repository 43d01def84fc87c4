"""The on-disk format: manifest, index, tar files, images in them, checks, and the dataset card."""
