"""Forward passes compiled for one shape. On a GPU, they are captured as a CUDA graph: one launch per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NUM_WARM_UPS = 3  # calls before a capture, in which libraries choose their kernels and allocate their memory
# Kernels chosen by their measured speed would add numbers in another order in another run. Versions of torch differ in the options.
_OPTIONS = {"triton.autotune_pointwise": False, "deterministic": True}
# Largest differences by rounding, relative to the largest logit: 3.4 % for EfficientNet-L2 with random weights in bfloat16. In TF32,
# convolutions of float32 are as precise as those of float16.
_TOLERANCES = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 0.1}


class CompiledForward:
    """Function of batches of one shape, compiled by `torch.compile`.

    A graph of its own, not the mode `"reduce-overhead"`, because it covers what is not compiled as well, can be replayed by any thread, and
    runs no Python code per batch. Calls of several threads are not safe.

    Args:
        function: Function of pixels `[B, 3, h, w]` on their device that returns logits.
        shape: Shape `[B, 3, h, w]` to compile for.
        device: Device of the forward pass.
        dtype: Precision of the forward pass, which determines how much the compiled logits may differ.

    Raises:
        ArithmeticError: The compiled logits of random images differ from those of the function by more than rounding.
        Exception: Whatever torch raises if it cannot compile or capture the function.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], shape: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape = torch.Size(shape)
        examples = [_random_images(self.shape, seed).to(device) for seed in range(2)]
        expected = [function(images) for images in examples]  # first: a graph keeps its memory
        # One tensor for all calls: any other kind of tensor would be compiled again. Its layout is that of decoded batches.
        self._input = examples[0].clone(memory_format=torch.channels_last)
        self._function = _compile(function)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()
        _check_logits([self(images) for images in examples], expected, _TOLERANCES[dtype])

    def _capture(self) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                self._function(self._input)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory in the meantime.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._output = self._function(self._input)
        current.wait_stream(stream)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(current)
        self._graph = graph

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the logits of a batch.

        Args:
            images: Pixels of the compiled shape, on any device. Copies from pinned memory in channels-last layout do not wait for the GPU.

        Returns:
            Logits on the device, in memory of their own.
        """
        if self._graph is None:
            self._input.copy_(images)
            logits: Tensor = self._function(self._input)
            return logits
        stream = torch.cuda.current_stream(self._input.device)
        stream.wait_event(self._done)  # of a call on another stream
        self._input.copy_(images, non_blocking=True)
        self._graph.replay()
        logits = self._output.clone()  # the next replay overwrites the output
        self._done.record(stream)
        return logits


def _compile(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(pixels: Tensor) -> Tensor:
        return function(pixels)

    # Each function has a copy of the code: torch.compile runs code uncompiled, with a mere log message, that it has compiled 8 times.
    forward.__code__ = forward.__code__.replace()
    known = torch._inductor.list_options()
    options: dict[str, Any] = {name: value for name, value in _OPTIONS.items() if name in known}
    return torch.compile(forward, dynamic=False, options=options)


def _random_images(shape: torch.Size, seed: int) -> Tensor:
    """Return images of random patches, uint8. Noise images would be too similar to each other for a network."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (*shape[:2], 4, 4), dtype=torch.uint8, generator=generator, device="cpu")
    rows, columns = (torch.arange(side, device="cpu") * 4 // side for side in shape[2:])
    return patches[:, :, rows][..., columns]


def _check_logits(logits: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Check the compiled logits of two batches, which also shows whether a call ignores its images or overwrites earlier logits.

    Raises:
        ArithmeticError: The logits differ by more than rounding, or are those of the other batch.
    """
    scale = max(float(batch.abs().max()) for batch in expected)
    for i, batch in enumerate(logits):
        own, other = (float((batch - expected[j]).abs().max()) for j in (i, 1 - i))
        if not (batch.shape == expected[i].shape and own <= tolerance * scale and own <= other):
            raise ArithmeticError(
                f"compiled logits differ from uncompiled ones by {own / (scale or 1):.1%} of the largest logit, more than by rounding"
            )
