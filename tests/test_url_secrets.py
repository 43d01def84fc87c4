"""No credential of a URL is printed, logged, raised or written, for each entry point and each position in the URL."""

import logging
import shutil
import traceback

import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.cli import main
from relabel_datasets.storage import remote
from tests.conftest import ColourNet
from tests.servers import FaultyServer
from tests.versions import needs

USER, PASSWORD, SIGNATURE, FRAGMENT = "alice-user", "pass-W0rd", "51gnatur3", "fr4gment"
SECRETS = (USER, PASSWORD, SIGNATURE, FRAGMENT)
POSITIONS = {
    "user and password": f"http://{USER}:{PASSWORD}@{{host}}/{{path}}",
    "query": f"http://{{host}}/{{path}}?X-Amz-Signature={SIGNATURE}&X-Amz-Credential={USER}",
    "fragment": f"http://{{host}}/{{path}}#{FRAGMENT}",
    "upper case": f"HTTP://{USER}:{PASSWORD}@{{host}}/{{path}}?sig={SIGNATURE}",
    "misspelled": f"htpp://{USER}:{PASSWORD}@{{host}}/{{path}}?sig={SIGNATURE}",
    "no colon": f"https//{USER}:{PASSWORD}@{{host}}/{{path}}?sig={SIGNATURE}",
    "one slash": f"s3:/{USER}:{PASSWORD}@bucket/{{path}}?sig={SIGNATURE}",
    "chain": f"simplecache::http://{USER}:{PASSWORD}@{{host}}/{{path}}?sig={SIGNATURE}",
    "chain of files": f"zip://data::http://{USER}:{PASSWORD}@{{host}}/{{path}}?sig={SIGNATURE}",
    "encoded": f"http://{USER}%40corp:{PASSWORD}%21@{{host}}/{{path}}?sig={SIGNATURE}%3D",
    "token of the Hub": f"hf://{USER}:{PASSWORD}@datasets/org/{{path}}",
    "not escaped": f"http://{USER}:x@y/{PASSWORD}@{{host}}/{{path}}",
    "no scheme": f"{USER}:{PASSWORD}@{{host}}/{{path}}?sig={SIGNATURE}",
}
FAST = ("misspelled", "no colon")  # need no request; the other positions are tested in the slow tests
SOME = [position if position in FAST else pytest.param(position, marks=pytest.mark.slow) for position in POSITIONS]


@pytest.fixture
def kept(caplog, capfd, tmp_path):
    """Function that asserts that no secret is in the output, in log records, or below `tmp_path`."""
    caplog.set_level(logging.INFO)

    def check(*more: str) -> None:
        shown = "\n".join([*capfd.readouterr(), caplog.text, *more])
        assert not [secret for secret in SECRETS if secret in shown], shown
        for path in tmp_path.rglob("*"):
            assert not [secret for secret in SECRETS if secret in str(path)]
            if path.is_file() and path.suffix in (".json", ".md", ".html", ".csv"):
                assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()], path

    return check


@pytest.fixture
def server(dataset_folder, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    with FaultyServer(dataset_folder) as server:
        yield server


def url_of(position: str, server: FaultyServer, path: str) -> str:
    host = server.url.removeprefix("http://")
    return POSITIONS[position].format(host=host, path=path)


def raised(call) -> str:
    """Return the message, the traceback and the causes of the error of a call."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  any type: the message is tested
        call()
    return f"{caught.value!r} {caught.value} {''.join(traceback.format_exception(caught.value))}"


CALLS = {
    "load_dataset": lambda url, tmp: rd.load_dataset(url, "none", "train"),
    "revision=": lambda url, tmp: rd.load_dataset(url, revision="v1"),
    "token=": lambda url, tmp: rd.load_dataset(url, token="a-token"),
    "namespace=": lambda url, tmp: rd.load_dataset(url, namespace="org"),
    "LabelMaps": lambda url, tmp: rd.LabelMaps(url, "none"),
    "images=": lambda url, tmp: rd.load_dataset(tmp / "dataset", "labels-only", "train", images=url),
    "open_source": lambda url, tmp: rd.data.open_source(url),
    "WebDatasetSource": lambda url, tmp: rd.data.WebDatasetSource([url]),
    "ImageFolderSource": lambda url, tmp: rd.data.ImageFolderSource(url),
    "annotator": lambda url, tmp: rd.annotate.load_annotator(url),
    "PublishedCrops": lambda url, tmp: rd.annotate.PublishedCrops(url, "fkd", url),
    "find_format": lambda url, tmp: rd.annotate.find_format(url),
    "RelabelPipeline": lambda url, tmp: rd.data.RelabelPipeline(rd.load_dataset(url, "none", "train")),
    "PublishedMaps": lambda url, tmp: rd.annotate.PublishedMaps(url, "relabel"),
    "publish": lambda url, tmp: rd.publish(url, "org/name"),
    "verify": lambda url, tmp: rd.verify(url, "none", progress=False),
    "analyze boxes": lambda url, tmp: rd.analysis.analyze(boxes=url),
    "report": lambda url, tmp: rd.report.write_report(tmp / "dataset", f"{url}/x.html", "colours"),
    "checkpoint": lambda url, tmp: rd.TimmAnnotator("test_resnet", checkpoint=url),
    "classifier": lambda url, tmp: rd.train.load_classifier(url),
}


@pytest.mark.parametrize("position", SOME)
@pytest.mark.parametrize("call", CALLS)
def test_errors_contain_no_secrets(call, position, server, tmp_path, kept):
    kept(raised(lambda: CALLS[call](url_of(position, server, "none"), tmp_path)))


COMMANDS = {
    "inspect": ["{url}"],
    "inspect a shard": ["{url}/colours/train-00000-of-00003.tar"],
    "verify": ["{url}", "--num-workers", "0"],
    "verify --revision": ["{url}", "--revision", "v1"],
    "analyze": ["{url}", "--config", "none"],
    "pictures": ["{url}", "--config", "none", "--out", "{tmp}/pictures"],
    "pictures --images": ["{data}", "--config", "labels-only", "--images", "{url}", "--out", "{tmp}/pictures"],
    "report": ["{url}", "--config", "none", "--out", "{tmp}/report.html"],
    "build IMAGES": ["{url}", "{tmp}/out", "--annotator", "test_resnet"],
    "build --annotator": ["{data}", "{tmp}/out", "--annotator", "{url}"],
    "import --images": ["{tmp}", "{tmp}/out", "--format", "relabel", "--order", "hw", "--images", "{url}"],
    "evaluate IMAGES": ["test_resnet", "{url}", "--config", "none"],
    "evaluate MODEL": ["{url}", "{data}"],
    "train": ["{url}", "--config", "none", "--out", "{tmp}/run"],
    "train --images": ["{data}", "--config", "labels-only", "--images", "{url}", "--out", "{tmp}/run"],
    "compare": ["{url}", "--configs", "none"],
}


@pytest.mark.parametrize("position", SOME)
@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.parametrize("debug", [[], pytest.param(["--debug"], marks=pytest.mark.slow)], ids=["", "debug"])
def test_failing_commands_print_no_secrets(case, position, debug, server, tmp_path, dataset_folder, kept):
    values = {"url": url_of(position, server, "none"), "tmp": tmp_path, "data": dataset_folder}
    assert main([case.partition(" ")[0], *(text.format(**values) for text in COMMANDS[case]), *debug]) == 1
    kept()


@pytest.mark.parametrize("position", ["user and password", "query", "fragment", "upper case", "encoded"])
def test_success_prints_and_writes_no_secrets(position, server, tmp_path, kept):
    url = url_of(position, server, "").replace("/?", "?").replace("/#", "#")
    dataset = rd.load_dataset(url, "colours", "train", cache_dir=tmp_path / "cache")
    report = rd.verify(url, num_workers=0, progress=False)
    assert report.ok
    for command in (
        ["inspect", url],
        ["verify", url, "--num-workers", "0", "--json", str(tmp_path / "verify.json")],
        ["analyze", url, "--config", "colours", "--num-crops", "26", "--out", str(tmp_path / "analysis")],
        ["report", url, "--config", "colours", "--num-crops", "26", "--out", str(tmp_path / "report.html")],
    ):
        assert main(command) == 0
    kept(repr(dataset), repr(report), str(report), report.to_json(), str(dataset.root))


@needs("fsspec", 2026)  # earlier releases cannot remove a folder of a URL with a query
def test_a_build_to_a_url_prints_and_writes_no_secrets(image_folder, tmp_path, kept, monkeypatch):
    annotator = ModuleAnnotator(
        ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name=f"https://{USER}:{PASSWORD}@host/net"
    )
    monkeypatch.setattr("relabel_datasets.cli.build.annotator_from", lambda args: annotator)
    url = f"memory://{USER}:{PASSWORD}@bucket/data?sig={SIGNATURE}"
    assert main(["build", str(image_folder), url, "--annotator", "any", "--config", "colours"]) == 0
    kept()
    local = tmp_path / "local"
    rd.build(rd.data.ImageFolderSource(image_folder), local, annotator, config="colours", progress=False)
    assert "https://host/net" in (local / "colours" / "_info.json").read_text()
    shutil.rmtree(image_folder)
    kept()
