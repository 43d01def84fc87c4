"""Run `relabel train` as `python -m relabel_datasets.train` or `torchrun -m relabel_datasets.train`."""

import sys

from ..cli.train import main

if __name__ == "__main__":
    sys.exit(main())
