"""Uploads folders to the Hugging Face hub, or says in a sentence why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import UserError


class Hub:
    """A repository for models on the hub, created or found at once, so that a refusal comes before the work.

    Args:
        name: `owner/name`.
        public: whether everybody may see it.
    """

    def __init__(self, name: str, public: bool) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"push_to_hub: {name} is no name of a repository; give owner/name.") from error
        if "/" not in name:
            raise UserError(f"push_to_hub: {name} has no owner; give owner/name.")
        if get_token() is None:
            raise UserError("push_to_hub: no token for the hub; log in with `hf auth login`, or set HF_TOKEN.")
        self.name, self._api = name, HfApi(library_name="rlhf")
        with self._refusals():
            self._api.create_repo(name, private=not public, exist_ok=True)
            if not public and not self._api.model_info(name).private:
                raise UserError(f"push_to_hub: {name} is public; add --public true, or give another name.")

    def upload(self, folder: Path, message: str) -> str:
        """Uploads a folder as one commit, and returns its address."""
        with self._refusals(f"; the export is in {folder}"):
            return str(self._api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=message))

    @contextmanager
    def _refusals(self, but: str = "") -> Iterator[None]:
        """Turns what the hub refuses into a sentence."""
        from huggingface_hub.errors import HTTPError

        try:
            yield
        except (HTTPError, OSError) as error:
            why = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
            raise UserError(f"push_to_hub: the hub did not take {self.name}: {why}{but}.") from error
