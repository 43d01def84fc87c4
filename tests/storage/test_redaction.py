"""Redaction of credentials in paths, URLs, texts and storage options."""

import pickle
import traceback

import pytest

from relabel_datasets.storage.redaction import redact, redact_path, redact_values, redacted_cause, secrets_of
from relabel_datasets.storage.remote import RemoteFiles

USER, PASSWORD, SIGNATURE = "alice-user", "pass-W0rd", "51gnatur3"
SECRET = (USER, PASSWORD, SIGNATURE)
URLS = {  # URL -> redacted URL
    f"https://{USER}:{PASSWORD}@host/a/b.tar?X-Amz-Signature={SIGNATURE}": "https://host/a/b.tar",
    f"https://host:8000/a?sig={SIGNATURE}&x=1": "https://host:8000/a",
    f"https://host/a#access_token={SIGNATURE}": "https://host/a",
    f"https://host?{SIGNATURE}": "https://host",
    f"HTTPS://{USER}:{PASSWORD}@host/a": "HTTPS://host/a",
    f"htps://{USER}:{PASSWORD}@host/a?{SIGNATURE}": "htps://host/a",
    f"s3:/{USER}:{PASSWORD}@bucket/a?{SIGNATURE}": "s3:/bucket/a",
    f"https:\\\\{USER}:{PASSWORD}@host\\a": "https:\\\\host\\a",
    f"https:///{USER}:{PASSWORD}@host/a": "https:///host/a",
    f"{USER}:{PASSWORD}@host/a?{SIGNATURE}": "host/a",
    f"//{USER}:{PASSWORD}@host/a": "host/a",
    f"https//{USER}:{PASSWORD}@host/a?{SIGNATURE}": "host/a",
    f"https;//{USER}:{PASSWORD}@host/a?{SIGNATURE}": "host/a",
    f"htp//{USER}:{PASSWORD}@host/a": "host/a",
    f"S3/{USER}:{PASSWORD}@bucket/a": "bucket/a",
    f"s3://{USER}:{PASSWORD}/with+slash@bucket/a": "s3://bucket/a",
    f"https://{USER}:{PASSWORD}?x@host/a": "https://***",  # "x@host" may be a query
    f"https://{USER}:x@y?{PASSWORD}@host/a": "https://***",
    f"https://{USER}:x@host/a?sig=y@{SIGNATURE}": "https://***",
    f"https://{USER}:x/y@host/a?sig=z@{SIGNATURE}": "https://***",
    f"https://{USER}:x@y/{PASSWORD}@bucket/a": "https://bucket/a",
    f"s3://{USER}:x@{PASSWORD}/y@bucket/a": "s3://bucket/a",
    f"s3://{USER}:x@y\\{PASSWORD}@bucket/a?{SIGNATURE}": "s3://bucket/a",
    f"s3://{USER}@corp:x@{PASSWORD}/y@bucket/a": "s3://bucket/a",
    f"s3:/{USER}:x@y/{PASSWORD}@bucket/a": "s3:/bucket/a",
    f"{USER}:x@y/{PASSWORD}@host/a": "host/a",
    f"{USER}:x@y?{PASSWORD}@host/a": "***",
    f"https//{USER}:x@y/{PASSWORD}@host/a": "host/a",
    f"https://{USER}:1234/{PASSWORD}@host/a": "https://host/a",  # 1234 is not a port
    f"https%3A%2F%2F{USER}%3Ax%40y%2F{PASSWORD}%40host%2Fa": "https://host/a",
    f"simplecache::https://{USER}:x@y/{PASSWORD}@host/a": "simplecache::https://host/a",
    f"https://{USER}:{PASSWORD}@{PASSWORD}@host/a": "https://host/a",
    f"https://{USER}%40corp:{PASSWORD}%2F@host/a": "https://host/a",
    f"https%3A%2F%2F{USER}%3A{PASSWORD}%40host%2Fa%3Fsig%3D{SIGNATURE}": "https://host/a",
    f"simplecache::https://{USER}:{PASSWORD}@host/a?{SIGNATURE}": "simplecache::https://host/a",
    f"zip://in.tar?{SIGNATURE}::https://{USER}:{PASSWORD}@host/a?{SIGNATURE}": "zip://in.tar::https://host/a",
    f"hf://{USER}:{PASSWORD}@datasets/org/name@main/x": "hf://main/x",  # the password may go on until "@main"
    f"hf://{PASSWORD}@datasets/org/name": "hf://datasets/org/name",
    f"hf:{USER}:{PASSWORD}@org/name": "org/name",
    f"gs://bucket/a?X-Goog-Signature={SIGNATURE}": "gs://bucket/a",
    f"az://container/a?se=1&sig={SIGNATURE}%3D": "az://container/a",
    f"https://{USER}:{PASSWORD}@[::1]:8000/a?{SIGNATURE}": "https://[::1]:8000/a",
}


def assert_no_secret(text: str) -> None:
    assert not [secret for secret in SECRET if secret in text], text


class TestPaths:
    @pytest.mark.parametrize(("url", "redacted"), URLS.items())
    def test_urls_are_redacted(self, url, redacted):
        assert redact_path(url) == redacted
        assert redact_path(redacted) == redacted

    def test_passwords_and_queries_may_contain_spaces_and_quotes(self):
        assert redact_path(f"https://{USER}:a '\"{PASSWORD}@host/a b?x='{SIGNATURE} \"y") == "https://host/a b"

    @pytest.mark.parametrize(
        "path",
        [
            "data", "/data/x?y#z", "./a@b/c", "../x:y", "C:\\data", "data/a:b@c", "data//x", "org/name", "org/name@main", "scenes-relabel",
            "https://127.0.0.1:8000/org@v2/x", "http://localhost:8000/org@v2/x", "https://[::1]:8000/a@b", "s3://bucket/key@2x.png", "hf://datasets/org/name@main", "a::b", "",
        ],
    )  # fmt: skip
    def test_other_paths_are_unchanged(self, path):
        assert redact_path(path) == path

    def test_paths_may_be_of_any_type(self, tmp_path):
        assert redact_path(tmp_path) == str(tmp_path)
        assert redact_path(b"s3://u:p@bucket/x") == "s3://bucket/x"


class TestTexts:
    @pytest.mark.parametrize(
        ("url", "redacted"),
        [(url, redacted) for url, redacted in URLS.items() if "//" in url.lstrip("/") or "%3A" in url],
    )
    @pytest.mark.parametrize(
        "text", ["{}", "403, url='{}'", "cannot read {}: damaged", 'URL("{}")', "({})\n{}", "a={}"]
    )
    def test_urls_in_a_text_are_redacted(self, url, redacted, text):
        result = redact(text.format(url, url))
        assert redacted in result
        assert_no_secret(result)

    @pytest.mark.parametrize(
        "text",
        [
            f"AuthenticationFailed: sig={SIGNATURE}",
            f"GET /a?X-Amz-Credential={USER}&X-Amz-Signature={SIGNATURE}",
            f"{{'Authorization': 'Bearer {PASSWORD}'}}",
        ],
    )
    def test_signatures_and_tokens_outside_of_urls_are_redacted(self, text):
        assert_no_secret(redact(text))

    def test_tokens_of_the_hub_are_redacted(self):
        assert redact("token hf_abcdefghijklmnopqrstuvwxyz is not valid") == "token *** is not valid"

    @pytest.mark.parametrize(
        "text",
        [
            "log in with `hf auth login` or give token= if it is private",
            "there is no README.md in https://host:8000/a: check the URL",
            "org/name@0123abc/colours/x.tar: its SHA-256 is wrong",
            "ratio 1:2, at user@host, a:b",
        ],
    )
    def test_other_texts_are_unchanged(self, text):
        assert redact(text) == text

    def test_values_of_json_are_redacted(self):
        value = {"name": f"https://{USER}:{PASSWORD}@host/a", "sizes": [1, 2.5, None, f"x?sig={SIGNATURE}"]}
        assert redact_values(value) == {"name": "https://host/a", "sizes": [1, 2.5, None, "x?sig=***"]}


class TestSecrets:
    def test_secrets_of_a_url_are_found_in_every_encoding(self):
        secrets = secrets_of("https://me%40corp:p%2Fss+word@host/x?sig=a%2Bbc%3D&v=1#part2")
        assert {"p/ss word", "p/ss+word", "p%2Fss+word", "a+bc=", "a%2Bbc%3D", "part2"} <= secrets
        assert redact("me@corp p/ss+word a+bc=", secrets) == "me@corp *** ***"

    def test_storage_options_are_secret_but_not_their_endpoints(self):
        options = {"key": "key-id", "client_kwargs": {"x": ["a-secret"], "endpoint_url": "https://host"}, "anon": True}
        assert secrets_of("s3://bucket", options) == {"key-id", "a-secret"}

    def test_a_token_instead_of_a_user_is_secret(self):
        assert "the-token" in secrets_of("hf://the-token@datasets/org/name")

    @pytest.mark.parametrize("url", URLS)
    def test_login_and_query_of_every_url_are_secret(self, url):
        shown = " ".join(secrets_of(url))
        assert [secret for secret in SECRET if secret in url and secret not in shown] == []

    def test_short_strings_are_not_secret(self):
        assert secrets_of("https://a:b@host/x?c=d") == set()


@pytest.mark.parametrize("login", ["u:x@y/z", "u:x/y", "u:x?y", "u:x#y", "u@corp:x/y", "u:1@2/3"])
@pytest.mark.parametrize("scheme", ["https", "s3", "ftp", "memory"])
def test_a_password_that_is_not_escaped_is_refused_before_a_part_of_it_is_sent_as_a_host(login, scheme):
    with pytest.raises(
        ValueError, match=r"^[a-z0-9]+://(host/a|\*\*\*): it is not clear where the password of this URL ends"
    ) as caught:
        RemoteFiles(f"{scheme}://{login}@host/a", {})
    assert "x" not in str(caught.value).partition(": ")[0]


@pytest.mark.parametrize(
    "url",
    [
        "https://u:x@host/a", "https://u@corp:x@host/a", "https://u:%40%2F@host/a", "https://host:8020/user/me@corp/a",
        "https://container@account/a@b", "https://host/a?x@y", "https://[::1]:80/a@b", "memory://a@b/c@d",
    ],
)  # fmt: skip
def test_other_urls_with_an_at_sign_are_accepted(url):
    assert str(RemoteFiles(url, {}).name)


def test_a_cause_is_chained_without_secrets():
    def fail() -> None:
        try:
            raise OSError(f"no route to https://{USER}:{PASSWORD}@host/?{SIGNATURE}")
        except OSError as error:
            raise ValueError("not there") from redacted_cause(error, [USER])

    with pytest.raises(ValueError, match="not there") as caught:
        fail()
    shown = "".join(traceback.format_exception(caught.value))
    assert "OSError: no route to https://host/" in shown
    assert_no_secret(shown)
    assert "OSError" in str(pickle.loads(pickle.dumps(caught.value.__cause__)))
