import subprocess
import sys

import pytest

import relabel_datasets as rd


def test_all_is_sorted_and_every_name_is_there():
    constants_first = sorted(rd.__all__, key=lambda name: (not name.isupper(), name))  # as ruff has it
    assert constants_first == rd.__all__
    assert all(getattr(rd, name) is not None for name in rd.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        rd.nonsense  # noqa: B018


def test_importing_the_package_imports_neither_timm_nor_the_hub_nor_a_cuda_context():
    script = (
        "import sys, torch, relabel_datasets as rd; rd.load_dataset, rd.LabelPooling; "
        "heavy = ('timm', 'matplotlib', 'datasets', 'huggingface_hub', 'webdataset', 'ray', 'argparse_'); "
        "print([m for m in heavy if m in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split("\n")[0]
        == "[] False"
    )
