"""Where the base of adapters lies on this machine, compared by digest with what the manifest names. Imports no torch.

Places are looked at in this order: a folder that the user names, the store of blobs, and what was downloaded from the hub.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.model.adapter import BaseSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import ConfigError, DiskError
from lutetia.system.files import write_atomic
from lutetia.system.paths import default_cache_folder

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+?)(?:/(?P<folder>[\w./-]+))?@(?P<commit>[0-9a-f]{7,64})$")
_MEMO = "base-digests.json"
BASE_FILE = "base.json"
"""In a run's folder: what `write_paths` wrote."""


def find_base(base: BaseSpec, folder: Path | None = None, store: BlobStore | None = None) -> dict[str, Path] | None:
    """The base's files by name; None if they are not all here.

    Reading a base of 28 GB takes minutes. So its digests are remembered for as long as size and time of the files stay.

    Args:
        base: what the manifest names.
        folder: that the user names; the base must be in it, or in its folder `transformer`, or `transformer_2` if the base is.
        store: of blobs, whose digests were compared when they came.

    Raises ConfigError when `folder` lacks a file or holds another.
    """
    if folder is not None:
        return _in_folder(base, folder)
    if store is not None and all(store.has(ref.digest) for ref in base.files.values()):
        return {name: store.path(ref.digest) for name, ref in base.files.items()}
    cached = _in_hub_cache(base)
    if cached:
        try:
            check_files(base, cached)
        except ConfigError as error:
            log.warning("what was downloaded of the base is not used: %s", error)
            return None
    return cached


def check_files(base: BaseSpec, files: Mapping[str, Path]) -> None:
    """Raises ConfigError unless `files` are exactly the base's, by size and digest."""
    for name, ref in base.files.items():
        path = files.get(name)
        if path is None or not path.is_file():
            raise ConfigError(
                f"the base {base.source} lacks {name}{f' at {path}' if path else ''}; name the folder that holds it"
            )
        if (size := path.stat().st_size) != ref.size:
            raise ConfigError(f"{path} has {size} bytes, {name} of the base {base.source} {ref.size}; {_remedy(base)}")
    for name, ref in base.files.items():
        if (found := digest_of_file(files[name])) != ref:
            text = f"{files[name]} is not {name} of the run's base {base.source}: its digest is {found.digest[:16]}"
            raise ConfigError(f"{text} instead of {ref.digest[:16]}; {_remedy(base)}")


def missing_base(base: BaseSpec) -> ConfigError:
    """What to do when the base is not here and nobody serves it."""
    return ConfigError(
        f"the run trains adapters on {base.source} ({base.size / 1e9:.1f} GB), which is not on this machine and which the run's "
        f"owner does not serve; {_remedy(base)}"
    )


def _remedy(base: BaseSpec) -> str:
    match = _HUB_ID.match(base.source)
    if match is None:
        return "ask the run's owner for it, and name its folder with --base"
    return f"fetch it with `hf download {match['repo']} --revision {match['commit']}`, or name its folder with --base"


def _in_folder(base: BaseSpec, folder: Path) -> dict[str, Path]:
    folder = folder.expanduser().absolute()
    part = "transformer_2" if base.source.partition("@")[0].rpartition("/")[2] == "transformer_2" else "transformer"
    if not any((folder / name).is_file() for name in base.files) and (folder / part).is_dir():
        folder = folder / part
    files = {name: folder / name for name in base.files}
    check_files(base, files)
    return files


def _in_hub_cache(base: BaseSpec) -> dict[str, Path] | None:
    match = _HUB_ID.match(base.source)
    if match is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found: dict[str, Path] = {}
    for name in base.files:
        cached = try_to_load_from_cache(match["repo"], "/".join(filter(None, (match["folder"], name))), revision=match["commit"])
        if not isinstance(cached, str):
            return None
        found[name] = Path(cached)
    return found


def digest_of_file(path: Path) -> BlobRef:
    """Digest and size of a file; from memory if it was read before and its size and time are the same."""
    memo_file = default_cache_folder() / _MEMO
    path = path.resolve()
    status = path.stat()
    known = [status.st_size, status.st_mtime_ns]
    memo = _read_memo(memo_file)
    if (entry := memo.get(str(path))) and entry[:2] == known:
        return BlobRef(digest=entry[2], size=status.st_size)
    log.info("reading %s (%.1f GB) once to compare its digest", path, status.st_size / 1e9)
    ref = ChunkTable.of_file(path).ref
    with contextlib.suppress(DiskError, OSError):  # then it is read again next time
        memo_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memo_file, json.dumps({**_read_memo(memo_file), str(path): [*known, ref.digest]}).encode())
    return ref


def _read_memo(path: Path) -> dict[str, list]:
    with contextlib.suppress(OSError, ValueError):
        memo = json.loads(path.read_bytes())
        if isinstance(memo, dict):
            return {key: entry for key, entry in memo.items() if isinstance(entry, list) and len(entry) == 3}
    return {}


def write_paths(path: Path, files: Mapping[str, Path]) -> None:
    """Write down where the base's files are, for processes that only compute. Raises DiskError."""
    write_atomic(path, json.dumps({name: str(file.absolute()) for name, file in files.items()}, indent=1).encode())


def read_paths(path: Path) -> dict[str, Path]:
    """What `write_paths` wrote. Raises ConfigError if it is missing or malformed."""
    try:
        return {str(name): Path(file) for name, file in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}, which says where the run's base is, cannot be read; start the coordinator again") from error
