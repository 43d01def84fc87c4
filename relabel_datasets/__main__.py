"""Run the `relabel` command as `python -m relabel_datasets`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
