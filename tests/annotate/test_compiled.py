"""Compiled annotators: same maps, one compilation per run, and a reported fallback."""

import logging
import re

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate import annotator as annotator_module
from relabel_datasets.annotate import compiled
from relabel_datasets.annotate.annotator import ModuleAnnotator, prepare
from relabel_datasets.annotate.combine import Ensemble, FlipAveraged
from relabel_datasets.annotate.engines import Description
from relabel_datasets.annotate.preprocessing import preprocessed, preprocessing_of
from relabel_datasets.shards.manifest import Manifest
from tests.annotate.small_models import MODELS, ONE_BY_DEFAULT, make, random_pixels
from tests.conftest import ColourNet, colours

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
compile_function = torch.compile


class Compiler:
    """Stand-in of `torch.compile` without code generation, which needs a compiler."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, function, *, dynamic, options):
        assert not dynamic
        assert options

        def count(graph, _inputs):
            self.graphs += 1
            return graph.forward

        return compile_function(function, dynamic=False, backend=count)


@pytest.fixture
def compiler(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stand_in = Compiler()
    monkeypatch.setattr(torch, "compile", stand_in)
    yield stand_in
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_one_kind_of_batch_is_one_graph_without_breaks_and_gives_the_same_maps(name, dtype, compiler):
    annotator = make(name, dtype, compile=True)
    pixels = random_pixels(3)
    with annotator.uncompiled():
        expected = annotator(pixels), annotator.classify(pixels)
    assert not compiler.graphs
    annotator.prepare(3, 10)
    assert annotator.compiled
    for _ in range(2):
        assert torch.equal(annotator(pixels), expected[0])
    assert compiler.graphs == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(annotator(pixels[:2]), expected[0][:2], rtol=1e-2, atol=1e-2)
    assert torch.equal(annotator.classify(pixels), expected[1])
    assert compiler.graphs == 1  # other shapes and labels of whole images run uncompiled
    annotator.prepare(3, 10, classify=True)
    assert torch.equal(annotator.classify(pixels), expected[1])
    assert torch.equal(annotator(pixels), expected[0])
    assert compiler.graphs == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_a_linearised_head_runs_uncompiled_behind_a_compiled_body(compiler):
    annotator = make("test_vit", "float32", compile=True, head="linearised")
    pixels = random_pixels()
    with annotator.uncompiled():
        expected = annotator(pixels)
    torch.testing.assert_close(annotator(pixels), expected)
    assert compiler.graphs > 0


@pytest.fixture
def gpu(monkeypatch):
    """Let annotators on the CPU follow the defaults of a GPU."""

    def on_cpu(function, shape, device, dtype):
        assert device.type == "cuda"
        return compiled.CompiledForward(function, shape, torch.device("cpu"), dtype)

    def move(annotator):
        monkeypatch.setattr(annotator_module, "CompiledForward", on_cpu)
        monkeypatch.setattr(annotator, "device", torch.device("cuda"))

    return move


def compile_nothing(function):
    raise OSError("no C++ compiler\nat all")


def add_a_tenth(function):
    return lambda pixels: 1.1 * function(pixels)


def ignore_the_input(function):
    first = []
    return lambda pixels: first[0] if first else first.append(function(pixels)) or first[0]


def overwrite_the_output(function):
    buffers = []

    def call(pixels):
        logits = function(pixels)
        buffers.append(logits.clone())
        return buffers[0].copy_(logits)

    return call


def return_nan(function):
    return lambda pixels: function(pixels) * float("nan")


def return_one_image(function):
    return lambda pixels: function(pixels)[:1]


WRONG = [add_a_tenth, ignore_the_input, overwrite_the_output, return_nan, return_one_image]
FAILURES = [(compile_nothing, "OSError: no C++ compiler at all")]
FAILURES += [(wrong, "ArithmeticError: compiled logits ") for wrong in WRONG]


@pytest.mark.parametrize(("fake_compile", "reason"), FAILURES)
def test_an_annotator_that_cannot_be_compiled_or_has_other_logits_runs_uncompiled_with_one_line_that_says_why(
    fake_compile, reason, gpu, monkeypatch, caplog
):
    annotator = colours()
    pixels = torch.randint(0, 256, (4, 3, 48, 64), dtype=torch.uint8)
    expected = annotator(pixels)
    monkeypatch.setattr(torch, "compile", lambda function, **_: fake_compile(function))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        gpu(annotator)
        for _ in range(2):
            annotator.prepare(4, annotator_module.MIN_COMPILED)
        patch.setattr(annotator, "device", torch.device("cpu"))
        assert torch.equal(annotator(pixels), expected)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"colours runs uncompiled, which is slower: torch.compile failed. {reason}")
    assert not annotator.compiled


@pytest.mark.parametrize(("fake_compile", "reason"), FAILURES)
def test_what_must_be_compiled_and_cannot_is_an_error(fake_compile, reason, monkeypatch):
    annotator = ModuleAnnotator(ColourNet(), (48, 64), name="colours", compile=True, device="cpu")
    monkeypatch.setattr(torch, "compile", lambda function, **_: fake_compile(function))
    message = rf"colours cannot be compiled here: leave out compile=.*{re.escape(reason)}"
    for call in (
        lambda: annotator.prepare(2, 2),
        lambda: annotator(torch.zeros(2, 3, 48, 64, dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not annotator.compiled


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_network_whose_logits_are_the_same_for_all_images_can_be_compiled(bias, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    module = torch.nn.Conv2d(3, 2, 8, stride=8)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.constant_(module.bias, bias)
    annotator = ModuleAnnotator(module, 16, compile=True, device="cpu")
    annotator.prepare(2, 2)
    assert annotator.compiled


@pytest.mark.parametrize(
    ("choice", "device", "num_images", "is_compiled"),
    [
        (None, "cpu", 10**9, False),
        (None, "cuda", annotator_module.MIN_COMPILED, True),
        (None, "cuda", annotator_module.MIN_COMPILED - 1, False),
        (False, "cuda", 10**9, False),
        (True, "cpu", 1, True),
    ],
)
def test_large_builds_on_a_gpu_are_compiled_by_default(choice, device, num_images, is_compiled, gpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    annotator = ModuleAnnotator(ColourNet(), (48, 64), compile=choice, device="cpu")
    if device == "cuda":
        gpu(annotator)
    annotator.prepare(2, num_images)
    assert annotator.compiled == is_compiled


def test_an_annotator_that_was_compiled_for_a_large_build_runs_a_small_one_uncompiled(gpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    annotator = ModuleAnnotator(ColourNet(), (48, 64), device="cpu")
    gpu(annotator)
    for num_images in (annotator_module.MIN_COMPILED, 10, annotator_module.MIN_COMPILED):
        annotator.prepare(2, num_images)
        assert annotator.compiled == (num_images != 10)


def test_any_number_of_annotators_is_compiled(compiler):
    limit = 8  # of torch, for each function
    annotators = [ModuleAnnotator(ColourNet(), (48, 64), compile=True, device="cpu") for _ in range(limit + 1)]
    prepare(Ensemble(annotators), 2, 2)
    assert compiler.graphs == len(annotators)


def test_every_model_of_an_ensemble_is_compiled(compiler):
    models = [ModuleAnnotator(ColourNet(), (48, 64), compile=choice, device="cpu") for choice in (True, True, False)]
    both = Ensemble([FlipAveraged(models[0]), models[1]])
    mixed = Ensemble(models)
    assert Description.of(both).compiled is False
    prepare(mixed, 4, 4)
    assert [model.compiled for model in models] == [True, True, False]
    assert Description.of(both).compiled is True
    assert Description.of(mixed).compiled is None


def test_another_normalization_is_not_that_of_the_compiled_model(compiler):
    annotator = ModuleAnnotator(ColourNet(), (48, 64), compile=True, device="cpu")
    pixels = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    before = annotator(pixels)
    with preprocessed(annotator, preprocessing_of(annotator)._replace(mean=(0.0, 0.0, 0.0))):
        changed = annotator(pixels)
    assert not torch.allclose(changed, before)
    assert torch.equal(annotator(pixels), before)
    assert compiler.graphs == 1


@pytest.mark.parametrize("encoding", ["heatmaps", pytest.param("crops", marks=pytest.mark.slow)])
def test_a_build_compiles_its_full_batches_once_and_records_it(encoding, tmp_path, image_folder, compiler):
    source = rd.data.ImageFolderSource(image_folder)
    num_crops = 3 if encoding == "crops" else None

    def build(out, **arguments):
        annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours", device="cpu", **arguments)  # fmt: skip
        build_config = rd.annotate.BuildConfig(encoding=encoding, batch_size=4, num_crops=num_crops)
        rd.build(source, out, annotator, build_config=build_config, shard_size=6, progress=False)
        return Manifest.load(out / "colours").splits["train"]

    split, eager = build(tmp_path / "compiled", compile=True), build(tmp_path / "eager")
    assert compiler.graphs == 1
    assert split.computed_with["compiled"] is True
    assert "compiled" not in eager.computed_with
    assert split.shard_sha256 == eager.shard_sha256  # this compiler changes no bits
    (tmp_path / "compiled" / "colours" / split.filenames[0]).unlink()
    with pytest.raises(rd.DatasetError, match="another compiled: compiled true there, false now"):
        build(tmp_path / "compiled")
    (tmp_path / "eager" / "colours" / split.filenames[0]).unlink()
    with pytest.raises(rd.DatasetError, match="another compiled: compiled false there, true now"):
        build(tmp_path / "eager", compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of compilers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generated_code_gives_the_same_maps_but_for_rounding(dtype):
    annotator = make("test_resnet", dtype, compile=True)
    pixels = random_pixels()
    with annotator.uncompiled():
        expected = annotator(pixels)
    tolerance = 1e-3 if dtype == "float32" else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(annotator(pixels), expected, rtol=1e-3, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")  # warnings of compilers
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_on_a_gpu_gives_the_same_maps_from_any_stream(name):
    annotator = make(name, "bfloat16", "cuda", compile=True)
    pixels = [random_pixels(4).pin_memory() for _ in range(3)]
    with annotator.uncompiled():
        expected = [annotator(batch) for batch in pixels]
    annotator.prepare(4, 12)
    assert isinstance(annotator._compiled[False], compiled.CompiledForward)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = [annotator(pixels[0])]
        for batch in pixels[1:]:
            with torch.cuda.stream(torch.cuda.Stream()):
                logits.append(annotator(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for got, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))
