"""Push the LoRA of a run folder to the hub, with its model card."""

from __future__ import annotations

import os
from pathlib import Path

from vlmteacher import arguments
from vlmteacher.errors import InputError, first_line
from vlmteacher.files import read_text
from vlmteacher.runs.folder import RECORD

FILES = ("lora.safetensors", "README.md", "queries.json", "before.mp4", "after.mp4")  # run.json holds local paths


def push_to_hub(
    folder: str | os.PathLike[str], repo: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Upload a finished run folder to the model repository OWNER/NAME, which is made where it is not there yet.

    The hub checks the card before anything is uploaded. The token is huggingface_hub's (`hf auth login`). Returns the
    address of the commit. Raises InputError for a folder without a LoRA or a card, a card that the hub refuses, and a
    hub that cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(arguments.path("folder", folder))
    if missing := [name for name in ("lora.safetensors", "README.md", RECORD) if not (path / name).is_file()]:
        raise InputError(f"{path} is no folder of a finished run: it has no {missing[0]}")
    try:
        card = ModelCard(read_text(path / "README.md", "model card"))
        card.validate(repo_type="model")
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id,
            folder_path=path,
            allow_patterns=list(FILES),
            revision=revision,
            commit_message="LoRA of one video, by vlmteacher",
        )
    except (HfHubHTTPError, HFValidationError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be pushed to {repo} ({first_line(error)}): see `hf auth whoami`") from error
    return str(commit)
