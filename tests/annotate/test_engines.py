import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.engines import Description, find_engine
from relabel_datasets.annotate.ray_actors import Actors, _Node, _Slot
from relabel_datasets.cli import main


def test_an_unknown_engine_is_refused_before_any_work(tmp_path, image_folder, annotator):
    with pytest.raises(ValueError, match=r"engine must be 'local', 'ray' or an engine .* got 'spark'"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, engine="spark")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("options", [{"num_actors": 0}, {"gpus_per_actor": -1}, {"cpus_per_actor": 0}])
def test_options_of_ray_have_minimum_values(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rd.annotate.RayEngine(**options)


def test_an_engine_object_is_used_directly():
    engine = rd.annotate.RayEngine(num_actors=3)
    assert find_engine(engine) is engine


def test_actors_are_all_compiled_or_none():
    actors = object.__new__(Actors)
    actors._description = Description(None, 3, {"name": "colours"}, "cuda", compiled=True)
    other = Description(None, 3, {"name": "colours"}, "cuda", compiled=False)
    message = r"on host2 differs .*'colours'}, not compiled there, {'name': 'colours'}, compiled elsewhere"
    with pytest.raises(rd.DatasetError, match=message):
        actors._on_set_up(_Slot(None, None), other, _Node("2", "host2", 1))


def test_options_of_ray_require_the_ray_engine(tmp_path, image_folder, capsys):
    arguments = ["build", str(image_folder), str(tmp_path / "data"), "--annotator", "resnet10t", "--actors", "3"]
    assert main(arguments) == 1
    assert "--engine ray" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_error_while_a_batch_is_encoded_stops_the_build(tmp_path, image_folder, annotator, monkeypatch, batch_size):
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return encode(*arguments)

    from relabel_datasets.labels import codec

    encode = codec.encode
    monkeypatch.setattr(codec, "encode", fail)
    build_config = rd.annotate.BuildConfig(batch_size=batch_size)
    with pytest.raises(ZeroDivisionError):
        rd.build(
            rd.data.ImageFolderSource(image_folder), tmp_path, annotator, build_config=build_config, progress=False
        )
    assert not list(tmp_path.rglob("*.tar*"))


def test_progress_reaches_the_number_of_images(tmp_path, image_folder, annotator, capsys):
    (image_folder / "cat" / "photo_00.jpg").write_bytes(b"")
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path, annotator, shard_size=4)
    assert "13/13" in capsys.readouterr().err
