"""The hooks of `v2.Transform`. Torchvision 0.19 and 0.20 have them under private names."""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2

_IS_PUBLIC = hasattr(v2.Transform, "transform")
CHECK_INPUTS = "check_inputs" if _IS_PUBLIC else "_check_inputs"
MAKE_PARAMS = "make_params" if _IS_PUBLIC else "_get_params"
TRANSFORM = "transform" if _IS_PUBLIC else "_transform"

if _IS_PUBLIC:
    Transform = v2.Transform
else:

    class Transform(v2.Transform):  # type: ignore[no-redef]
        """Base class that calls the public hooks."""

        def _check_inputs(self, flat_inputs: list[Any]) -> None:
            self.check_inputs(flat_inputs)

        def _get_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            return self.make_params(flat_inputs)

        def _transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            return self.transform(inpt, params)

        def check_inputs(self, flat_inputs: list[Any]) -> None:
            pass

        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            return {}

        def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            raise NotImplementedError
