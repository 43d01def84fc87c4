"""Entry point of `python -m relabel_datasets.train` and `torchrun -m relabel_datasets.train`: `relabel train`."""

import sys

from ..cli.train import main

if __name__ == "__main__":
    sys.exit(main())
