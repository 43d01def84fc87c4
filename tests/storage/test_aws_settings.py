"""Credentials and settings for S3 that are missing or wrong on this machine: an error that says so, without retries."""

import os

import pytest

from relabel_datasets.errors import RefusedError
from relabel_datasets.storage.remote import RemoteFiles

ROLE = "role_arn = arn:aws:iam::1:role/x\n"
SETTINGS = {  # kind: (content of the configuration file, environment, part of the message)
    "no credentials": ("", {}, "NoCredentialsError"),
    "half of the credentials": ("", {"AWS_ACCESS_KEY_ID": "x"}, "AWS_SECRET_ACCESS_KEY"),
    "no such profile": ("[default]\n", {"AWS_PROFILE": "none"}, r"profile \(none\) could not be found"),
    "a damaged file": ("[default\n", {}, "Unable to parse config file"),
    "no login": (
        "[profile p]\nsso_start_url = https://x.invalid\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = x\n",
        {"AWS_PROFILE": "p"},
        "SSO",
    ),
    "no such source": (f"[profile p]\n{ROLE}source_profile = none\n", {"AWS_PROFILE": "p"}, "source_profile \"none\""),
    "no token file": ("", {"AWS_ROLE_ARN": "arn:aws:iam::1:role/x", "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token"}, "/no/token"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_wrong_settings_of_this_machine_are_named_without_retries(kind, tmp_path, monkeypatch):
    content, environment, says = SETTINGS[kind]
    (tmp_path / "config").write_text(content)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "none"}
    for name, file in files.items():
        monkeypatch.setenv(name, str(tmp_path / file))
    for name, value in {**environment, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("the request is repeated"))
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"user_agent": kind},
    }  # another file system: fsspec caches them
    with pytest.raises(
        RefusedError, match=f"s3://bucket/data/file cannot be read: .*{says}.*credentials are given and valid"
    ):
        RemoteFiles("s3://bucket/data", options).read_small("file", len, 100)
