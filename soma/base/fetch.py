"""Bring what a reference names to this machine: a folder or file that can be read, whole and verified.

    ./models/mine              a local path, as it is
    hf:org/name[@revision]     a Hugging Face model: config, tokenizer and safetensors, never pickled weights
    hf:org/name[@rev]/a/file   one file of it
    https: s3: gs: hf: //…     one file, or the folder of a model; cached under SOMA_CACHE by content
    registry:NAME[@VERSION]    a registered model (soma/base/registry.py)

`#sha256=<hex>` after a URL is enforced. Away from the network a cached copy is used, with a notice.
"""

import difflib
import re
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from soma.base import cache
from soma.base.cache import MODEL_FILES
from soma.base.errors import UserError
from soma.base.secrets import URL, scrub

Kind = Literal["model", "file"]

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^/@\s]+))?(?:/(?P<file>[^@\s]+))?")


def fetch(ref: str, kind: Kind = "model") -> Path:
    """A local folder (kind="model") or file (kind="file") for a reference.

    Raises UserError that says what could not be found or reached and what to do; secrets in a URL are never shown.
    """
    if ref.startswith("registry:"):
        from soma.base.registry import resolve

        return resolve(ref.removeprefix("registry:"))
    if ref.startswith("file://"):
        return _local(unquote(ref.removeprefix("file://")))
    if URL.match(ref):
        return cache.fetch_model(ref) if kind == "model" else cache.fetch_file(ref)
    if ref.startswith("hf:"):
        return _fetch_hub(ref.removeprefix("hf:"), kind)
    return _local(ref)


def _local(ref: str) -> Path:
    """The path itself, or an error that names the nearest thing that exists."""
    path = Path(ref).expanduser()
    if path.exists():
        return path
    parent, name = path.absolute(), path.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    near = difflib.get_close_matches(name, sorted(entry.name for entry in parent.iterdir()), n=1, cutoff=0.5)
    hint = f"; did you mean {parent / near[0]}?" if near else f" (the folder {parent} exists, {name!r} in it does not)"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", ref) and not near:
        hint += f". A model on the Hugging Face hub is written hf:{ref}"
    raise UserError(f"{ref}: no such file or folder{hint}")


def _fetch_hub(name: str, kind: Kind) -> Path:
    """A model (or one file of it) through the hub's own cache, which keeps and verifies what it has."""
    match = HUB_ID.fullmatch(name)
    if match is None or (kind == "file") != bool(match["file"]):
        form = "hf:org/name[@revision]" + ("/path/to/file" if kind == "file" else "")
        raise UserError(f"hf:{name}: expected {form}")
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    repo, revision = match["repo"], match["revision"]
    where = f"hf:{name}"
    try:
        if kind == "file":
            return Path(hf_hub_download(repo, match["file"], revision=revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(MODEL_FILES)))
    except errors.GatedRepoError:
        raise UserError(f"{where}: ask for access on the model's page on the hub, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: no such model on the hub, or a private one (then set HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: the model has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{where}: {error}") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{where}: the Hugging Face hub cannot be reached and there is no whole copy in its cache. Connect to the "
            "network (or unset HF_HUB_OFFLINE) and run this once, or give the path of a local model folder"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"{where}: the repository has no file {match['file']!r}") from None
    except (OSError, errors.HTTPError) as error:
        raise UserError(f"{where}: could not be downloaded ({scrub(str(error), name)}); try again") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: the repository has no config.json, so it is not a model in Hugging Face format")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{where}: the repository has no *.safetensors weights. Pickled weights (.bin, .pt) can run code when "
            "loaded and are not read; use a revision with safetensors, or convert with transformers' save_pretrained"
        )
    return folder
