"""Files of Hugging Face's hub: from the local cache where they are there, else downloaded."""

import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from utils.run.errors import InputError

CACHE_HELP = (
    f"neither in the cache ({huggingface_hub.constants.HF_HUB_CACHE}) nor to be had ({{reason}}); give a local file "
    f"with --checkpoint, or set HF_HOME or HF_HUB_CACHE to a cache that holds them"
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a repository or folder, the first that is there


def cached_file(repo: str, names: tuple[str, ...], revision: str | None = None) -> Path | None:
    """The first of the files that the cache holds; it asks the network nothing."""
    found = [huggingface_hub.try_to_load_from_cache(repo, name, revision=revision) for name in names]
    return next((Path(path) for path in found if isinstance(path, str)), None)


def hub_file(name: str, files: tuple[str, ...]) -> Path | None:
    """The first of `files` that a repository has.

    Args:
        name: owner/repository, perhaps with @revision.

    Raises:
        InputError: there is no such repository, or it is neither in the cache nor to be had.
    """
    repo, _, revision = name.partition("@")
    if cached := cached_file(repo, files, revision or None):
        return cached
    if reason := unreachable():
        raise InputError(f"hf-hub:{name}: {files[0]} is {CACHE_HELP.format(reason=reason)}")
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision or None))
        except RepositoryNotFoundError as error:
            raise InputError(f"hf-hub:{name}: the hub has no such model, or not for everyone") from error
        except (EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue  # the next one, perhaps
            raise InputError(f"hf-hub:{name}: {file} is {CACHE_HELP.format(reason=error)}") from error
    return None


def unreachable() -> str:
    """Why nothing can be downloaded; empty if it can, or if a proxy stands between.

    huggingface_hub itself would try for most of a minute before it gives up.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    if address.scheme in urllib.request.getproxies():
        return ""
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=5):
            return ""
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
