"""The files of a folder by name. Hidden files are left out; linked folders, and links that lead outside or nowhere, are named."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Fault = Literal["outside", "nowhere", "special", "unreadable"]
FAULTS: dict[Fault, str] = {
    "outside": "is a link that leads outside the folder; copy the file into it",
    "nowhere": "is a link that leads nowhere; remove it",
    "special": "is no regular file; remove it",
    "unreadable": "cannot be accessed; allow reading it",
}


@dataclass
class Folder:
    """What lies below a folder.

    Attributes:
        root: the folder.
        files: name → path of every file that may be read. Names are relative to the root, with forward slashes.
        faults: name → why it may not be read, of everything else that is no folder.
        not_entered: name → reason, of folders that were not looked into.
    """

    root: Path
    files: dict[str, Path] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    not_entered: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names: dict[str, str] = {}

    def chosen(self, wanted: Callable[[str], bool]) -> Iterator[str]:
        """The names of files and faults that are wanted, in order."""
        yield from sorted(name for name in (*self.files, *self.faults) if wanted(name))

    def find(self, name: str) -> str:
        """The name of the file that is written `name`, perhaps in another normal form of Unicode; `name` if there is none."""
        if name in self.files or name in self.faults:
            return name
        if not self._names:
            self._names.update({unicodedata.normalize("NFC", each): each for each in (*self.files, *self.faults)})
        return self._names.get(unicodedata.normalize("NFC", name), name)


def read_folder(root: Path) -> Folder:
    """List what lies below `root`. No file is opened."""
    folder, real_root = Folder(root), os.path.realpath(root)
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
        except OSError:
            folder.not_entered[prefix.rstrip("/") or "."] = "the folder cannot be read; allow reading it"
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
            else:
                _add(folder, name, Path(entry.path), entry.is_symlink(), real_root)
    return folder


def _add(folder: Folder, name: str, path: Path, is_link: bool, real_root: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        folder.faults[name] = "unreadable"
        return
    except OSError:
        folder.faults[name] = "nowhere" if is_link else "unreadable"
        return
    if stat.S_ISDIR(mode):
        folder.not_entered[name] = "a linked folder is not entered; copy it here, or pass its own path"
    elif not stat.S_ISREG(mode):
        folder.faults[name] = "special"
    elif is_link and os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
        folder.faults[name] = "outside"
    else:
        folder.files[name] = path


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def readable(name: str) -> str:
    """`name` with bytes that are not UTF-8 written as \\xNN, so that it can be printed and saved."""
    return "".join(f"\\x{ord(each) & 0xFF:02x}" if "\ud800" <= each <= "\udfff" else each for each in name)
