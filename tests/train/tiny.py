"""The tiny student as a recipe and as options of the command line."""

from relabel_datasets.train.recipe import Recipe

MODEL_ARGS = {"channels": [8, 16, 32, 64], "stem_width": 8}
TINY = Recipe(
    model="resnet10t", model_kwargs=MODEL_ARGS, image_size=32, crop_pct=1.0, epochs=1, batch_size=16, warmup_epochs=0,
    mix_off_epochs=0,
)  # fmt: skip
OPTIONS = (
    "--model", "resnet10t", "--model-kwargs", *(f"{key}={value}" for key, value in MODEL_ARGS.items()), "--image-size", "32", "--crop-pct", "1",
    "--warmup-epochs", "0", "--device", "cpu", "--no-progress",
)  # fmt: skip
