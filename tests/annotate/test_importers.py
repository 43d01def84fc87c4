import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.ops import roi_align
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.cli import main
from tests.annotate.releases import (
    CLASSES,
    annotated_release,
    dense_of,
    pack,
    publish,
    random_map,
    run,
    save,
    write_release,
)
from tests.conftest import picture
from tests.sabotage import at_once, files_first, sabotaged


@pytest.fixture
def release(tmp_path, image_folder):
    """Folder of label maps of `image_folder`, 5 locations high and 7 wide, with 2 of 3 classes per location."""
    write_release(tmp_path / "release", image_folder, lambda i, _: publish(random_map(i)))
    return tmp_path / "release"


@pytest.mark.parametrize("source_format", ["relabel", "tokenlabeling"])
@pytest.mark.parametrize("order", ["hw", "wh"])
def test_pooled_crops_equal_roi_align_of_the_published_tensor(tmp_path, image_folder, order, source_format):
    tensors = write_release(
        tmp_path / "release",
        image_folder,
        lambda i, _: publish(random_map(i), order=order, source_format=source_format),
    )
    run(tmp_path / "release", tmp_path / "data", source_format, order=order, images=image_folder)
    crop = v2.Compose([v2.RandomResizedCrop(24, scale=(0.05, 1)), v2.RandomHorizontalFlip()])
    dataset = rd.load_dataset(tmp_path / "data", source_format, "train", images=image_folder, transforms=crop)
    assert len(dataset) == 13
    for _, label_map in [sample for _ in range(5) for sample in dataset]:
        dense = dense_of(tensors[label_map.key], 3, order)
        x1, y1, x2, y2 = label_map.view.box_xyxy
        x1, x2 = sorted((x1, x2))  # reversed by flips
        box = torch.tensor([[0, x1 * 7, y1 * 5, x2 * 7, y2 * 5]])
        expected = roi_align(dense[None], box, 1, aligned=True)[0, :, 0, 0].softmax(0)
        _, pooled = rd.LabelPooling()(PIL.Image.new("RGB", (24, 24)), label_map)
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "relative"), [("float16", 2**-11), ("uint8", None)])
def test_scores_are_within_the_rounding_of_the_stored_dtype(tmp_path, image_folder, dtype, relative):
    def tensor_of(i, _):
        tensor = publish(random_map(i))
        tensor[0] += torch.rand(tensor[0].shape, generator=torch.Generator().manual_seed(i))  # not exact in float16
        return tensor

    tensors = write_release(tmp_path / "release", image_folder, tensor_of)
    run(tmp_path / "release", tmp_path / "data", storage_dtype=dtype)
    for key, label_map in rd.LabelMaps(tmp_path / "data").items():
        scores, indices = tensors[key]
        span = scores.flatten(1).amax(1) - scores.flatten(1).amin(1)
        bound = scores.abs() * relative if relative else (span / 255 * 0.51)[:, None, None] + 0.01
        assert ((label_map.logits - scores).abs() <= bound + 1e-6).all()
        assert torch.equal(label_map.classes, indices.long())
        assert label_map.base is None  # the score of other classes is 0


def test_a_tar_and_its_folder_produce_the_same_shards(tmp_path, release):
    run(release, tmp_path / "folder", shard_size=4)
    run(pack(release, tmp_path / "release.tar"), tmp_path / "tar", shard_size=4, num_threads=1)
    run(pack(release, tmp_path / "plain.tar", prefix="."), tmp_path / "plain", shard_size=4)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "relabel").iterdir()}
        for name in ("folder", "tar", "plain")
    ]
    assert len(files[0]) == 6
    assert files[0] == files[1] == files[2]


def test_shards_have_the_same_samples_as_a_build_of_the_same_images(tmp_path, release, image_folder, annotator):
    imported = run(release, tmp_path / "data", images=image_folder, shard_size=4, include_images=True)
    built = rd.build(
        rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, shard_size=4, progress=False
    )
    maps = [rd.LabelMaps(tmp_path / "data", name) for name in ("relabel", "colours")]
    assert list(maps[0]) == list(maps[1])
    assert maps[0].index.labels.tolist() == maps[1].index.labels.tolist()
    assert [maps[0].image_bytes(row) for row in range(13)] == [maps[1].image_bytes(row) for row in range(13)]
    assert imported.splits["train"].source_sha256 == built.splits["train"].source_sha256
    assert imported.made_with == built.made_with
    assert sorted(imported.encoding) == sorted(built.encoding)


def test_the_manifest_records_the_origin_of_the_maps(tmp_path, release, image_folder):
    manifest = run(release, tmp_path / "data", order="wh", images=image_folder, config="mine")
    assert manifest.annotator == {
        "kind": "imported",
        "name": "mine",
        "format": "relabel",
        "reference": "https://github.com/naver-ai/relabel_imagenet",
        "order": "wh",
        "canvas": "images",
        "num_classes": 3,
    }
    assert manifest.encoding == {"name": "topk", "k": 2, "dtype": "float16", "map_size": [7, 5]}
    assert manifest.classes == list(CLASSES)
    assert manifest.splits["train"].key_rule == "stem"
    assert "mine" in (tmp_path / "data" / "README.md").read_text()


def test_synsets_have_the_indices_and_classes_of_imagenet(tmp_path):
    dense = random_map(0, (3, 3), 1000)
    for folder in ("n15075141", "n01440764"):
        (tmp_path / "release" / folder).mkdir(parents=True)
        (tmp_path / "release" / folder / f"{folder}_10026.pt").write_bytes(save(publish(dense, 5)))
    manifest = run(tmp_path / "release", tmp_path / "data")
    maps = rd.LabelMaps(tmp_path / "data")
    assert {key: label_map.label for key, label_map in maps.items()} == {"n01440764_10026": 0, "n15075141_10026": 999}
    assert len(manifest.classes) == 1000
    assert manifest.classes[:2] == ["n01440764", "n01443537"]
    torch.testing.assert_close(maps["n01440764_10026"].dense(), dense_of(publish(dense, 5), 1000))


def test_classes_may_be_given_in_another_order(tmp_path, release):
    run(release, tmp_path / "data", classes=("emu", "yak", "dog", "cat"))
    maps = rd.LabelMaps(tmp_path / "data")
    assert {maps[f"photo_{i:02d}"].label for i in (0, 3)} == {3}
    assert maps.manifest.classes == ["emu", "yak", "dog", "cat"]


def test_skip_bad_skips_reports_and_lists_bad_files(tmp_path, release, image_folder, capsys, caplog):
    (release / "cat" / "photo_00.pt").write_bytes(save(publish(random_map(0) * float("nan"))))
    (release / "dog" / "photo_01.pt").write_bytes(b"")
    manifest = run(release, tmp_path / "data", skip_bad=True, shard_size=6)
    split = manifest.splits["train"]
    assert split.num_samples == 11
    assert sorted(entry["key"] for entry in split.skipped) == ["photo_00", "photo_01"]
    assert str(release / "cat" / "photo_00.pt") in capsys.readouterr().err
    assert "2 files skipped: see `skipped`" in caplog.text
    joined = rd.load_dataset(tmp_path / "data", split="train", images=image_folder)  # no error for skipped images
    assert len(joined) == 11


def test_the_most_common_shape_is_expected(tmp_path, release):
    first = sorted(release.glob("*/*"))[np.random.default_rng(0).permutation(13)[0]]
    first.write_bytes(save(publish(random_map(0, (3, 3)))))
    assert run(release, tmp_path / "data", skip_bad=True).splits["train"].num_samples == 12


def test_an_import_without_any_valid_file_is_an_error(tmp_path, release):
    with pytest.raises(rd.errors.LabelMapError, match="none of 13 files is a label map of format 'tokenlabeling'"):
        run(release, tmp_path / "data", "tokenlabeling", skip_bad=True)
    assert not (tmp_path / "data").exists()


def test_an_existing_config_is_not_overwritten(tmp_path, release):
    run(release, tmp_path / "data")
    before = (tmp_path / "data" / "relabel" / "_info.json").read_bytes()
    with pytest.raises(rd.DatasetError, match="exists already"):
        run(release, tmp_path / "data", split="validation")
    assert (tmp_path / "data" / "relabel" / "_info.json").read_bytes() == before
    run(release, tmp_path / "data", config="another")


def test_an_interrupted_import_leaves_no_files(tmp_path, release, monkeypatch):
    read = rd.annotate.PublishedMaps.read

    def interrupted(self, index):
        if (tmp_path / "data" / "relabel" / "train-00001-of-00003.tar").exists():
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(rd.annotate.PublishedMaps, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(release, tmp_path / "data", shard_size=5)
    assert not (tmp_path / "data" / "relabel").exists()
    monkeypatch.undo()
    run(release, tmp_path / "data", shard_size=5)


@pytest.mark.parametrize("remove", [at_once, files_first])
def test_removing_the_folder_stops_the_import(tmp_path, release, remove):
    folder = tmp_path / "data" / "relabel"
    with (
        sabotaged(folder, lambda event, name: event == "os.rename" and name.startswith(".train-00000"), remove),
        pytest.raises(FileNotFoundError, match=rf"{folder}.* was removed during the build"),
    ):
        run(release, tmp_path / "data")
    assert not folder.exists()


def test_the_size_of_an_image_is_that_after_exif_rotation(tmp_path, release, image_folder):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(0, (30, 50)).save(image_folder / "cat" / "photo_00.jpg", exif=exif)
    (image_folder / "dog" / "photo_01.jpg").unlink()
    picture(1, (30, 50)).save(image_folder / "dog" / "photo_01.png", exif=exif)
    for options in ({}, {"include_images": True, "config": "with-images"}):
        run(release, tmp_path / "data", images=image_folder, **options)
        dataset = rd.load_dataset(tmp_path / "data", options.get("config", "relabel"), "train", images=image_folder)
        sizes = {}
        for row, key in enumerate(dataset.keys):
            image = dataset.image(row)
            sizes[key] = dataset.label_maps[key].canvas_size
            assert sizes[key] == (image.height, image.width)
        assert sizes["photo_00"] == sizes["photo_01"] == (50, 30)


def test_images_may_be_in_a_subfolder_named_like_the_split(tmp_path, release, image_folder):
    (tmp_path / "imagenet").mkdir()
    image_folder.rename(tmp_path / "imagenet" / "val")
    run(release, tmp_path / "data", images=tmp_path / "imagenet", split="validation")
    assert len(rd.load_dataset(tmp_path / "data", split="validation", images=tmp_path / "imagenet")) == 13


def test_images_and_maps_must_match_or_be_skipped(tmp_path, release, image_folder):
    (image_folder / "cat" / "photo_00.jpg").unlink()
    (image_folder / "dog" / "photo_01.jpg").rename(image_folder / "cat" / "photo_01.jpg")  # in another class
    (image_folder / "emu" / "photo_02.jpg").write_bytes(b"not an image")
    (release / "cat" / "photo_03.pt").unlink()
    message = (
        r"2 label maps without an image, such as 'photo_00', 'photo_01'; "
        r"2 images without a label map, such as 'photo_01', 'photo_03'"
    )
    with pytest.raises(rd.DatasetError, match=message):
        run(release, tmp_path / "data", images=image_folder)
    split = run(release, tmp_path / "data", images=image_folder, skip_bad=True).splits["train"]
    assert split.num_samples == 9
    assert sorted(entry["key"] for entry in split.skipped) == [
        "photo_00",
        "photo_01",
        "photo_01",
        "photo_02",
        "photo_03",
    ]
    (image_folder / "emu" / "photo_05.bmp").write_bytes(b"")
    with pytest.raises(rd.DatasetError, match="the same stem"):
        run(release, tmp_path / "data", images=image_folder, config="two")


def test_an_unreadable_image_stops_the_import(tmp_path, release, image_folder):
    (image_folder / "emu" / "photo_02.jpg").write_bytes(b"not an image")
    with pytest.raises(rd.errors.ImageError, match=r"photo_02.jpg: cannot be read as an image"):
        run(release, tmp_path / "data", images=image_folder)


def test_images_of_another_dataset_are_refused_even_with_skip_bad(tmp_path, release, image_folder):
    for path in image_folder.glob("*/*"):
        path.rename(path.with_stem(f"other_{path.stem}"))
    with pytest.raises(rd.DatasetError, match="none of 13 images"):
        run(release, tmp_path / "data", images=image_folder, skip_bad=True)


def test_maps_imported_without_images_have_the_size_of_the_loaded_image(tmp_path, release, image_folder):
    run(release, tmp_path / "without")
    run(release, tmp_path / "with", images=image_folder)
    assert rd.LabelMaps(tmp_path / "without")["photo_00"].canvas_size == (5, 7)
    pipeline = v2.Compose([v2.RandomCrop(20), rd.LabelPooling()])
    loaded = [
        rd.load_dataset(tmp_path / name, split="train", images=image_folder, transforms=pipeline)
        for name in ("with", "without")
    ]
    image, label_map = loaded[0].image(0), rd.LabelMaps(tmp_path / "without")[loaded[0].keys[0]]
    corrected = rd.LabelMap.wrap(label_map.logits, like=label_map, canvas_size=(image.height, image.width))
    torch.manual_seed(0)
    expected = loaded[0][0][1]
    torch.manual_seed(0)
    torch.testing.assert_close(pipeline(image, corrected)[1], expected)  # as documented
    for row in range(13):
        torch.manual_seed(row)
        expected = loaded[0][row][1]
        torch.manual_seed(row)
        torch.testing.assert_close(loaded[1][row][1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "auto"}, "order must be one of"),
        ({"storage_dtype": "uint4"}, "for topk maps, got 'uint4'"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"include_images": True}, "include_images needs the folder of the images"),
        ({"card": "no-such-card"}, "no-such-card"),
        ({"images": "/nowhere"}, "/nowhere"),
        ({"source_format": "fkd"}, "source_format must be one of"),
    ],
)
def test_invalid_options_are_refused_before_any_work(tmp_path, release, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(release, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_the_command_imports_and_prints_how_to_load(tmp_path, release, image_folder, capsys):
    arguments = ["import", str(pack(release, tmp_path / "release.tar")), str(tmp_path / "data"), "--format", "relabel"]
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join([*CLASSES, "polar bear"]))
    options = ["--images", str(image_folder), "--classes", str(classes), "--config", "mine", "--storage-dtype", "uint8"]
    assert main([*arguments, "--order", "wh", *options, "--shard-size", "9", "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "13 samples in 2 shards" in printed
    dataset = eval(printed.splitlines()[-1], {"load_dataset": rd.load_dataset})  # the printed line must be valid code
    assert dataset[0][1].shape == (2, 7, 5)
    assert dataset.classes == (*CLASSES, "polar bear")
    assert main([*arguments, "--order", "hw", "--include-images", "--images", str(image_folder)]) == 0
    assert len(eval(capsys.readouterr().out.splitlines()[-1], {"load_dataset": rd.load_dataset})) == 13


def test_the_command_detects_the_order(tmp_path, image_folder, annotator, capsys, monkeypatch):
    annotated_release(tmp_path / "release", image_folder, (40, 40), "wh")
    arguments = ["import", str(tmp_path / "release"), str(tmp_path / "data"), "--format", "relabel", "--order", "auto"]
    assert main(arguments) == 1
    assert "give --images and --annotator" in capsys.readouterr().err
    monkeypatch.setattr("relabel_datasets.cli.import_maps.annotator_from", lambda args: annotator)
    assert main([*arguments, "--images", str(image_folder), "--annotator", "colours"]) == 0
    assert "order wh: correlation" in capsys.readouterr().err
    assert rd.LabelMaps(tmp_path / "data").manifest.annotator["order"] == "wh"


def test_the_command_requires_an_order_and_refuses_options_of_crops(tmp_path, release, capsys):
    arguments = ["import", str(release), str(tmp_path / "data")]
    assert main(arguments) == 1
    assert (
        "has label maps (relabel), which do not say which axis is the height: give --order" in capsys.readouterr().err
    )
    assert main([*arguments, "--order", "hw", "--label-type", "hard"]) == 1
    assert "--label-type is for files of FKD" in capsys.readouterr().err


def test_the_example_of_the_guide_runs(tmp_path, image_folder, annotator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    annotated_release(tmp_path / "release", image_folder, (40, 40), "wh")
    pack(tmp_path / "release", tmp_path / "relabel_imagenet.tar")
    maps = rd.annotate.PublishedMaps("relabel_imagenet.tar", "relabel")
    order = rd.annotate.detect_order(maps, "images", annotator).order
    rd.annotate.import_label_maps(maps, "imagenet-relabel", order=order, images="images")
    dataset = rd.load_dataset("./imagenet-relabel", "relabel", split="train", images="images")
    agreement = []
    for image, label_map in dataset:
        dense = annotator(annotator.preprocess(image)[None])
        best = torch.nn.functional.interpolate(dense, (5, 5), mode="bilinear")[0].argmax(0)
        agreement.append((label_map.classes[0] == best).float().mean())
    assert torch.stack(agreement).mean() > 0.7
