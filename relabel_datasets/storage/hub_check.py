"""Check that the Hub can be reached before libraries load a model from it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .hub_errors import HubItem, describe_hub_error
from .retries import Failure, retry

_PAUSES_S = (1, 3)
_MAX_S = 15  # no attempt begins later
# Environment variables of timm and transformers for other caches than that of huggingface_hub.
_OTHER_CACHES = ("TIMM_USE_OLD_CACHE", "TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE")


def check_reachable(model: HubItem) -> None:
    """Raise an error soon if a model is not in the cache of the Hub and the Hub cannot be reached.

    timm and transformers ask for up to four files of the model, and huggingface_hub repeats each request for 23 seconds.

    Args:
        model: The model.

    Raises:
        LocalEntryNotFoundError: The Hub cannot be reached. Its cause is the last error of the HTTP client.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model.repo_id, repo_type="model"))
    is_cached = any(folder.glob("snapshots/*/*"))
    if is_cached or constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in _OTHER_CACHES):
        return
    url = hf_hub_url(model.repo_id, "config.json", revision=model.revision)
    start = time.monotonic()

    def explain(error: Exception) -> Failure:
        what = describe_hub_error(error, model)
        is_temporary = time.monotonic() - start < _MAX_S
        summary = f"{model}: the Hub cannot be reached: {what}"
        return Failure(errors.LocalEntryNotFoundError(what), error, is_temporary=is_temporary, summary=summary)

    def request() -> None:
        try:
            get_hf_file_metadata(url)
        except (errors.HfHubHTTPError, errors.FileMetadataError):
            return  # the Hub answers: the library finds out whether the model exists

    retry(request, explain, _PAUSES_S)
