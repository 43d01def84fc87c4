"""The environment of the tests: not that of the user, the terminal or the scheduler."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT

SETTINGS = (  # of users, terminals and schedulers
    "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE", "DATASETS_VERBOSITY", "AWS_PROFILE", "AWS_REGION",
    "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "FSSPEC_S3_KEY", "HTTP_PROXY",
    "https_proxy", "ALL_PROXY", "NETRC", "RELABEL_CACHE_LIMIT", "RELABEL_NAMESPACE", "RELABEL_CHECK_ON_OPEN", "RANK",
    "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCH_LOGS",
    "SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "RAY_ADDRESS", "ACCELERATE_USE_CPU",
    "TQDM_DISABLE", "MPLBACKEND", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR",
)  # fmt: skip


def environment_of_tests(**given):
    """Return the environment that tests get in one of the user."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RELABEL_TESTS_")}
    code = "import json, os, tests; print(json.dumps(dict(os.environ)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], env={**outside, **given}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(finished.stdout)


def test_settings_of_the_user_do_not_reach_tests(tmp_path):
    kept = {"RELABEL_TEST_DATA": "/data", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0"}
    found = environment_of_tests(
        **dict.fromkeys(SETTINGS, "x"), **kept, RELABEL_CACHE="/mine", HF_HOME="/mine", TMPDIR=str(tmp_path)
    )
    assert {name: found[name] for name in SETTINGS if name in found} == {}
    assert {name: found[name] for name in kept} == kept
    assert found["RELABEL_CACHE"].startswith(f"{found['HF_HOME']}/")
    assert found["HF_HOME"].startswith(f"{tmp_path}/")
