"""Mixtures on a hub: downloading one by its id, and uploading the one that a pipeline was loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lutetia.models.mixing.description import FILE
from lutetia.models.networks.model_ref import hub_errors, parse_ref
from lutetia.system.errors import ConfigError

HUB_OPTIONS = ("local_files_only", "revision", "token", "cache_dir")
_FILES = ("*.json", "*.safetensors", "README.md", "pipeline.py")


def mixture_place(name: Any, options: dict[str, Any]) -> Path:
    """The folder of a mixture: `name` itself, or the local copy of what a hub has under the id `name`.

    Args:
        name: a folder, or `owner/name[@revision]`.
        options: of `from_pretrained`; those of HUB_OPTIONS count.

    Raises ConfigError if the hub has no such id, or cannot be reached and nothing was downloaded before.
    """
    path = Path(str(name)).expanduser()
    if path.exists() or path.is_absolute() or not _is_hub_id(str(name)):
        return path
    from huggingface_hub import snapshot_download

    ref = parse_ref(str(name), "mixture", (), hub=not options.get("local_files_only"))
    if ref.subfolder:
        return path
    with hub_errors("mixture", ref):
        return Path(
            snapshot_download(
                ref.location, revision=options.get("revision") or ref.revision, token=options.get("token"),
                cache_dir=options.get("cache_dir"), local_files_only=ref.offline, allow_patterns=list(_FILES),
            )
        )  # fmt: skip


def _is_hub_id(name: str) -> bool:
    try:
        return not parse_ref(name, "mixture", ()).folder
    except ConfigError:
        return False


class PushesMixtures:
    """The upload of a pipeline's mixture."""

    transformer: Any

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the mixture that this pipeline was loaded from, each file as it is signed, with its model card.

        Args:
            repo_id: `owner/name`; made if it does not exist.
            commit_message: of the upload.
            private: whether a new repository is private; None: as the owner's account has it.
            token: of the hub; None: the one of `hf auth login`.
            create_pr: propose the change instead of making it.

        Returns:
            The address of the commit or the proposal.

        Raises:
            ConfigError: the pipeline was not loaded from a folder, or the hub refuses.
            IntegrityError: a file is missing or was changed.
        """
        from huggingface_hub import HfApi

        folder = self.transformer.folder
        if folder is None:
            raise ConfigError("this pipeline was not loaded from a mixture's folder; stitch one, and load that")
        names = [FILE, *folder.document.known_files]
        for name in names[1:]:
            folder.check(name)
        with hub_errors("repository", parse_ref(repo_id, "repository", ())):
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder.path, allow_patterns=names, create_pr=create_pr,
                commit_message=commit_message or f"Upload the mixture {folder.document.digest[:12]}",
            )  # fmt: skip
        return str(commit.pr_url if create_pr else commit.commit_url)
