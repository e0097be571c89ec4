"""An exported directory to the Hugging Face hub. The token comes from HF_TOKEN alone."""

import os

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError


def check_push(repo: str) -> None:
    """What can be known before anything is exported.

    Raises:
      UserError: a name that the hub does not take, or no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"config.push_to_hub={repo!r}: no name of a repository; give org/name") from error
    if "/" not in repo:
        raise UserError(f"config.push_to_hub={repo!r}: no name of a repository; give org/name")
    if not os.environ.get("HF_TOKEN"):
        raise UserError("config.push_to_hub: the environment has no HF_TOKEN; set it to a token that may write")


def push(directory: str, repo: str, private: bool) -> None:
    """Makes the repository `repo` if need be and uploads `directory` as one commit; process 0 does, the others wait.

    Raises:
      UserError: the hub refused, or could not be reached; the directory is as it was.
    """
    everywhere(lambda: _push(directory, repo, private), "the end of the upload")


def _push(directory: str, repo: str, private: bool) -> None:
    api = HfApi(token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Export")
    except Exception as error:  # of huggingface_hub and of what it speaks through
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{directory} is whole, but it could not be uploaded to {repo} ({reason}); check the network and whether "
            f"HF_TOKEN may write there, then: hf upload {repo} {directory}{' --private' if private else ''}"
        ) from error
