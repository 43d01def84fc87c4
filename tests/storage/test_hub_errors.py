import errno
import itertools
import os
import time
import traceback
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

import relabel_datasets as rd
from relabel_datasets.errors import DatasetError, RefusedError, UnavailableError
from relabel_datasets.storage.hub_check import check_reachable
from relabel_datasets.storage.hub_errors import HubItem, explain_hub_error, explaining_hub_errors

httpx = pytest.importorskip("httpx2" if find_spec("httpx2") else "httpx")  # the client of huggingface_hub 2 or 1
SECRET, TOKEN = "51gnatur3", "hf_token_of_a_user"
URL = f"https://cdn.host/x.tar?X-Amz-Signature={SECRET}"
HUB_ADVICE = (
    "force_download",
    "mozilla",
    "local_files_only",
    "Request ID",
    "pass a token",
    "HF_HUB_ENABLE",
    "ignore",
)
ITEM = HubItem("org/photos", "main", "colours/_info.json", token=TOKEN)


def answer(kind: type[errors.HfHubHTTPError], status: int, **headers: str) -> errors.HfHubHTTPError:
    """Return the error that huggingface_hub raises for a response, with its advice."""
    response = httpx.Response(status, headers=headers, request=httpx.Request("GET", URL))
    text = f"{status} Client Error: for url: {URL} (Request ID: 1)\nFor more information check: https://developer.mozilla.org/{status}"
    return kind(f"{text}\nplease pass a token {TOKEN}", response=response)


def not_in_cache(cause: Exception) -> errors.LocalEntryNotFoundError:
    error = errors.LocalEntryNotFoundError("cannot find it: set local_files_only=False, or try force_download=True")
    error.__cause__ = cause
    return error


HTTP = errors.HfHubHTTPError
CASES = {
    "no repository": (answer(errors.RepositoryNotFoundError, 404), FileNotFoundError, "or it is private: check the name"),
    "no revision": (answer(errors.RevisionNotFoundError, 404), FileNotFoundError, "no branch, tag or commit 'main'"),
    "no file": (answer(errors.RemoteEntryNotFoundError, 404), FileNotFoundError, "no colours/_info.json in org/photos"),
    "404": (answer(HTTP, 404), FileNotFoundError, "does not exist on the Hub: see"),
    "401": (answer(HTTP, 401), RefusedError, "answers 401 Unauthorized: check the token"),
    "403": (answer(HTTP, 403), RefusedError, "answers 403 Forbidden: check the token"),
    "gated": (answer(errors.GatedRepoError, 403), RefusedError, "is gated: request access at"),
    "disabled": (answer(errors.DisabledRepoError, 403), RefusedError, "answers 403 Forbidden"),
    "400": (answer(errors.BadRequestError, 400), DatasetError, "rejects the request: the Hub answers 400 Bad Request"),
    "409": (answer(HTTP, 409), UnavailableError, "answers 409 Conflict: try again"),
    "429": (answer(HTTP, 429, **{"Retry-After": "7"}), UnavailableError, "too many requests: .*: wait 7 s, or log in"),
    "500": (answer(HTTP, 500), UnavailableError, "answers 500 Internal Server Error: try again later"),
    "503": (answer(HTTP, 503), UnavailableError, "answers 503 Service Unavailable: try again later"),
    "offline": (not_in_cache(httpx.ConnectError("refused")), DatasetError, "cannot be reached: ConnectError: refused: check"),
    "timeout": (httpx.ReadTimeout("timed out"), UnavailableError, "the request timed out: check the connection"),
    "connection": (httpx.ConnectError(f"no route to {URL}"), UnavailableError, "ConnectError: no route to https://cdn.host"),
    "protocol": (httpx.RemoteProtocolError("peer closed"), UnavailableError, "peer closed"),
    "length": (
        OSError("Consistency check failed: file should be of size 9 but has size 3 (x).\nPlease retry with `force_download=True`."),
        UnavailableError, "should be of size 9 but has size 3",
    ),
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError, "the disk of the Hub's cache .* is full: free"),
    "name": (errors.HFValidationError("Repo id must use alphanumeric chars: ignore"), DatasetError, "expected org/name"),
    "an upload": (RuntimeError("Error while uploading"), None, ""),
    "others": (KeyError("x"), None, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["dataset", "images", "model"])
def test_every_error_has_the_advice_of_this_package_only(case, kind):
    error, expected, message = CASES[case]
    item = HubItem(ITEM.repo_id, ITEM.revision, ITEM.name, kind, TOKEN)
    explained = explain_hub_error(error, item)
    if expected is None:
        assert explained is None
        return
    assert type(explained) is expected
    assert explained.args
    with pytest.raises(expected, match=message):
        raise explained
    shown = str(explained)
    assert "\n" not in shown
    assert not [text for text in (*HUB_ADVICE, SECRET, TOKEN) if text in shown]


def test_the_cause_is_chained_without_secrets():
    def fail():
        with explaining_hub_errors(ITEM):
            try:
                raise CASES["503"][0]
            except OSError as error:
                raise ValueError("transformers says: pass force_download") from error

    with pytest.raises(UnavailableError) as caught:
        fail()
    shown = "".join(traceback.format_exception(caught.value))
    assert "transformers says" in shown
    assert SECRET not in shown
    assert TOKEN not in shown


class TestWithoutNetwork:
    """The address of the Hub leads to a server that is not running."""

    @pytest.fixture(autouse=True)
    def pauses(self, hf_cache, monkeypatch):
        """Pauses between requests in seconds, which are recorded instead of waited for."""
        pauses = []
        recorder = SimpleNamespace(**{**vars(time), "sleep": pauses.append})
        for module in (
            "huggingface_hub.utils._http",
            "huggingface_hub.file_download",
            "relabel_datasets.storage.retries",
        ):
            monkeypatch.setattr(f"{module}.time", recorder)
        return pauses

    @pytest.mark.parametrize(
        "load",
        [
            lambda: rd.TimmAnnotator("resnet18.a1_in1k", pretrained=True),
            lambda: rd.train.load_classifier("resnet18.a1_in1k", pretrained=True),
            lambda: rd.HFAnnotator("org/model"),
            lambda: rd.load_dataset("org/name"),
            lambda: rd.data.open_source("hf:org/name"),
        ],
        ids=["timm", "evaluate", "transformers", "dataset", "images"],
    )
    def test_the_error_of_every_download_says_what_to_do(self, load):
        with pytest.raises((DatasetError, FileNotFoundError)) as caught:
            load()
        shown = str(caught.value)
        assert "the Hub cannot be reached" in shown
        assert "check the connection, the proxy and HF_ENDPOINT" in shown
        assert not [text for text in HUB_ADVICE if text in shown]

    @pytest.mark.parametrize(
        ("load", "instead"),
        [
            (lambda: rd.TimmAnnotator("resnet18.a1_in1k", pretrained=True), "a file with checkpoint="),
            (lambda: rd.TimmAnnotator("hf-hub:timm/resnet18.a1_in1k@main", pretrained=True), "a file with checkpoint="),
            (lambda: rd.train.load_classifier("resnet18.a1_in1k", pretrained=True), "a file with checkpoint="),
            (lambda: rd.HFAnnotator("org/model"), "the folder of a saved model"),
        ],
        ids=["timm", "timm from the Hub", "evaluate", "transformers"],
    )
    def test_the_error_of_a_model_comes_after_few_attempts_and_says_meanwhile_what_happens(
        self, load, instead, pauses, caplog
    ):
        with pytest.raises(
            DatasetError, match=rf"is not in the Hub's cache, and the Hub cannot be reached: .*, or give {instead}$"
        ):
            load()
        assert pauses == [1, 3]
        messages = [record.getMessage() for record in caplog.records]
        assert [text for text in messages if "the Hub cannot be reached" in text and "next attempt in 3.0 s" in text]

    def test_slow_failures_are_not_repeated_for_more_than_15_seconds(self, pauses, monkeypatch):
        clock = itertools.count(0, 20)
        monkeypatch.setattr("relabel_datasets.storage.hub_check.time", SimpleNamespace(monotonic=lambda: next(clock)))
        with pytest.raises(DatasetError, match="the Hub cannot be reached"):
            rd.HFAnnotator("org/model")
        assert pauses == []

    @pytest.mark.parametrize("source", ["cache", "offline", "other cache"])
    def test_what_may_be_in_a_cache_is_left_to_the_library(self, source, hf_cache, monkeypatch):
        if source == "cache":
            (hf_cache / "models--org--model" / "snapshots" / "0").mkdir(parents=True)
            (hf_cache / "models--org--model" / "snapshots" / "0" / "config.json").touch()
        elif source == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        else:
            monkeypatch.setenv("TRANSFORMERS_CACHE", str(hf_cache))
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", None)  # not callable
        check_reachable(HubItem("org/model", kind="model"))


@pytest.mark.parametrize("fault", [404, 401, 503])
def test_any_answer_of_the_hub_is_left_to_the_library(fault, hf_cache, monkeypatch):
    def fail(url):
        raise answer(errors.HfHubHTTPError, fault)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    check_reachable(HubItem("org/model", kind="model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 3}, "with the model arguments .*depth.*: check their names"),
        ({"num_classes": "x"}, "'num_classes': 'x'"),
    ],
)
def test_wrong_model_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rd.TimmAnnotator("resnet18", **arguments)
