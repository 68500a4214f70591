"""An export to the Hugging Face hub, once it is whole. The token is where huggingface_hub looks for one (HF_TOKEN, hf auth login), never in a config or a command."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from kto_ds.errors import KtoError, UserError, excerpt

WHERE = "--push-to-hub"
LOG_IN = "log in with hf auth login, or set HF_TOKEN to a token that may write there"


def require_pushable(repo: str | None, *, private: bool, public: bool) -> None:
    """Refuse a name that the hub would not take, and options that contradict each other, before anything is exported."""
    if repo is None:
        if private or public:
            raise UserError("is about a repository on the hub, and none is named", where="--private" if private else "--public", remedy=f"give {WHERE} NAME/MODEL too, or leave it out")
        return
    if private and public:
        raise UserError("a repository is one of the two", where="--private, --public", remedy="keep one of them; without either it is private")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{excerpt(repo)} cannot name a repository: {str(error).splitlines()[0]}", where=WHERE, remedy="give user/model or organisation/model") from error


class Pushed(NamedTuple):
    address: str
    is_private: bool  # as the hub says it: a repository that was there stays what it was


def push(folder: Path, repo: str, *, public: bool) -> Pushed:
    """Upload a folder to a repository of the hub, which is made if need be. UserError where it does not get there; the folder stays as it is."""
    api = HfApi()
    stays = f"the export stays in {folder}"
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        is_private = bool(api.repo_info(made.repo_id).private)
        if not public and not is_private:
            raise UserError(f"{made.repo_id} is there already and public", where=WHERE, remedy=f"give --public if the model may be seen, or name another repository; {stays}")
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model trained with kto_ds")
    except KtoError:
        raise
    except Exception as error:  # among others those of the client's HTTP library, which is another one from release to release
        what, remedy = _reason(error, repo)
        # No bare hf upload: it would make a public repository, and does not look whether one that is there is private.
        raise UserError(what, where=WHERE, remedy=f"{remedy}, and start the same command again; {stays}") from error
    return Pushed(str(made), is_private)


def _reason(error: Exception, repo: str) -> tuple[str, str]:
    """Return (what kept an upload from the hub, what to do about it)."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps everything from the hub", "unset it where there is a network"
    if isinstance(error, HfHubHTTPError):
        said = excerpt(error.server_message or str(error).splitlines()[0])
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub does not let you write to {repo} (HTTP {status}): {said}", LOG_IN
        return f"the hub has refused it (HTTP {status}): {said}", "see whether the user or organisation in the name exists and is yours"
    return f"the hub cannot be reached: {type(error).__name__}: {excerpt(str(error), limit=400)}", "see whether the network reaches it"
