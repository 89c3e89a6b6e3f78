"""Model directories on the Hugging Face hub, by name: ``owner/name``. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from tokenformer.errors import TokenFormerError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
)
"""What a model directory can hold; nothing else is fetched, and no code."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(source: str) -> bool:
    """Whether ``source`` has the form ``owner/name``."""
    return _NAME.fullmatch(source) is not None


def local_or_hub(
    source: Path | str, *, files: tuple[str, ...] = MODEL_FILES, revision: str | None = None
) -> Path:
    """``source`` itself where it is a path; the snapshot of a repository where it is a string ``owner/name`` that no
    directory here has.

    Args:
        source: a path, or ``owner/name``.
        files: patterns of the files to fetch.
        revision: a branch, tag or commit of the repository; the newest by default. Of a local path: refused.

    Raises:
        TokenFormerError: the hub cannot be reached, or has no such repository or revision.
    """
    path = Path(source)
    if not isinstance(source, str) or path.exists() or not is_hub_name(source):
        if revision is not None:
            raise TokenFormerError(f"revision: '{revision}', but {source} is no repository of the hub")
        return path
    return _fetch(source, files, revision)


def _fetch(name: str, files: tuple[str, ...], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    local = f"there is no directory {name} here"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError as error:
        raise TokenFormerError(f"{name}: the hub has no revision '{revision}' of it") from error
    except GatedRepoError as error:
        raise TokenFormerError(
            f"{name}: access to this repository must be asked for on the hub; then log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise TokenFormerError(
            f"{name}: {local}, and the hub has no such repository, or a private one (log in with: hf auth login)"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # whatever the network and its libraries come up with
        reason = str(error).strip().splitlines()
        raise TokenFormerError(
            f"{name}: {local}, and the hub could not be reached ({reason[0] if reason else type(error).__name__}); "
            "give the path of a local model directory instead: fetch it where there is a network with "
            f"'hf download {name} --local-dir DIR', and load DIR"
        ) from error
