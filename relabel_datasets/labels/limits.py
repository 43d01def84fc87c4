"""Limits of label maps, which bound the memory that a small file can claim."""

MAX_CLASSES = 1 << 20  # a pooled label then has at most 4 MiB
MAX_CROPS = 1 << 16  # stored crops of an image
MAX_DENSE = 1 << 25  # classes x locations, or classes x stored crops; dense logits then have at most 128 MiB
MAX_SCALES = 8  # label maps of an image, one for each input size
MAX_SIDE = (1 << 31) - 1  # pixels of an image's height or width
