"""Extension of `PreTrainedModel.save_pretrained`, installed when transformers is imported; imports nothing heavy."""

from __future__ import annotations

import inspect
from functools import partial, wraps
from pathlib import Path
from typing import Any

from transformers import modeling_utils

from graftwork.core.run_folder import MANIFEST_FILE
from graftwork.grafting.marks import APPLIED

_HUB = ("repo_id", "commit_message", "private", "create_pr")
"""Arguments of an upload to the hub."""


def install() -> None:
    """Extend `PreTrainedModel.save_pretrained`, which then also writes the manifest of a graft."""
    # the saving of transformers is untyped
    model_class: Any = modeling_utils.PreTrainedModel
    original: Any = model_class.save_pretrained
    if hasattr(original, "graftwork"):
        return
    signature = inspect.signature(original)

    @wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        folder, main = Path(values["save_directory"]), bool(values["is_main_process"])
        # with an adapter of transformers' own PEFT integration, only the adapter is saved
        if folder.is_file() or getattr(self, "_hf_peft_config_loaded", False):
            return original(self, *args, **kwargs)
        if main:
            # the record of an earlier model in this folder is no longer valid
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
        if not self.__dict__.get(APPLIED):
            return original(self, *args, **kwargs)

        from graftwork.grafting import saving

        options: dict[str, Any] = values.pop("kwargs", {})
        hub = {name: options.pop(name) for name in _HUB if name in options}
        # the manifest is uploaded too, so that the upload follows it
        uploads, values["push_to_hub"] = bool(values["push_to_hub"]), False
        write = partial(original, *given.args, **options)
        saving.save_graft(self, write, folder, given_state=values["state_dict"] is not None, recorded=main)
        if uploads and main:
            saving.upload(folder, token=values["token"], **hub)
        return None

    setattr(save_pretrained, "graftwork", True)  # noqa: B010 (functions declare no attributes)
    model_class.save_pretrained = save_pretrained
