"""Tokenizers of the Hugging Face hub, by the name of their repository."""

from __future__ import annotations

import re
from pathlib import Path

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.hub import HUB_PREFIX
from tokenformer.language.tokenizers import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer

_OWNER_AND_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", re.ASCII)


def is_hub_tokenizer(tokenizer: str) -> bool:
    """Whether this names a repository: ``hf:NAME[@REVISION]`` or ``owner/name[@revision]``."""
    return tokenizer.startswith(HUB_PREFIX) or _OWNER_AND_NAME.fullmatch(tokenizer) is not None


def fetch_tokenizer(name: str, *, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a repository, kept in the hub's cache on this machine.

    Only ``tokenizer.json`` is read, and the name of the end-of-document token in ``tokenizer_config.json``.

    Raises:
        TokenFormerError: it cannot be fetched, or has no ``tokenizer.json``; as ``load_tokenizer``.
    """
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    file = _fetch(name, repository, revision or None, TOKENIZER_FILE)
    if file is None:
        raise TokenFormerError(
            f"tokenizer: {name} has no {TOKENIZER_FILE}; turn it into one with "
            f"transformers.AutoTokenizer.from_pretrained('{repository}').save_pretrained(DIR), and give DIR"
        )
    _fetch(name, repository, revision or None, CONFIG_FILE)  # into the same folder, where it is looked for
    return load_tokenizer(file, eos_token=eos_token)


def _fetch(name: str, repository: str, revision: str | None, file: str) -> Path | None:
    """The path of a file in the cache; None where the repository has no such file."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the library passes on whatever its client raises
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        local = "" if name.startswith(HUB_PREFIX) else "is no file or folder here and "
        reason = " ".join(str(error).split()) or "no reason given"
        raise TokenFormerError(
            f"tokenizer: {name} {local}cannot be fetched from the Hugging Face hub ({type(error).__name__}: {reason}); "
            "check the name and the access, or fetch it where there is access, with "
            f"'hf download {repository} {TOKENIZER_FILE} {CONFIG_FILE} --local-dir DIR', and give DIR"
        ) from error
