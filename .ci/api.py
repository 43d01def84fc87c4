"""Write the API reference, made from the docstrings, to the folder given. Warnings are errors."""

import sys
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pdoc

import relabel_datasets as rd

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Cannot determine where .* is taken from")  # attributes that torch adds to tensors
warnings.filterwarnings("ignore", "Error parsing type annotation")  # types that exist for type checkers only
warnings.filterwarnings("ignore", "Failed to run TYPE_CHECKING code")  # the same, where only stubs define them
subpackages = [import_module(f"relabel_datasets.{module.name}") for module in iter_modules(rd.__path__) if module.ispkg]
for package in (rd, *subpackages):
    for name in package.__all__:  # pdoc does not see names that are imported on first use
        setattr(package, name, getattr(package, name))
pdoc.render.configure(docformat="google")
modules = ["relabel_datasets", *(f"relabel_datasets.{module.name}" for module in iter_modules(rd.__path__))]
pdoc.pdoc(*modules, output_directory=Path(sys.argv[1]))
