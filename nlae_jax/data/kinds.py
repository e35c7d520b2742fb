"""Names the kinds of text that the files of a corpus stand for, where its documents do not name them themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

_FEWEST_FOLDERS = 4  # so many folders of one document each count as their parent folder


def kinds_of_files(several: Sequence[Path], single: Sequence[Path]) -> dict[Path, str]:
    """Names the kind of text in each file. `several` are files with several documents, `single` files with one.

    A file with several documents is one kind, named by the file's name up to the first dot. Files with a single
    document belong to the kind of their folder, which has the folder's name. Where two kinds would have the same name,
    the name is lengthened: first by the rest of the file's name, then by folders above it.
    """
    folders = _folders(single)
    longer = {path: _file_names(path.absolute()) for path in several}
    longer |= {folder: _with_folders(folder) for folder in folders.values()}
    names = _distinct(longer)
    return {path: names[path] for path in several} | {path: names[folders[path]] for path in single}


def _folders(single: Sequence[Path]) -> dict[Path, Path]:
    """Returns the folder whose name each file's kind takes.

    It is the file's folder. If several folders side by side have one file each, it is the folder above them: otherwise
    a corpus with one folder per document would have as many kinds as documents.
    """
    folder_of = {path: path.absolute().parent for path in single}
    depths = {len(folder.parts) for folder in folder_of.values()}
    for depth in range(max(depths, default=0), 1, -1):
        count = Counter(folder_of.values())
        beside: dict[Path, list[int]] = defaultdict(list)
        for folder, files in count.items():
            if len(folder.parts) == depth:
                beside[folder.parent].append(files)
        merged = {parent for parent, files in beside.items() if len(files) >= _FEWEST_FOLDERS and set(files) == {1}}
        for path, folder in folder_of.items():
            if len(folder.parts) == depth and folder.parent in merged:
                folder_of[path] = folder.parent
    return folder_of


def _file_names(path: Path) -> list[str]:
    """Returns possible names of a file, the shortest first. Dots at the beginning of the file's name are left out."""
    bare = path.name.lstrip(".")
    stem = bare.removesuffix(".gz").rpartition(".")[0] or bare
    folders = [f"{above}/" for above in _with_folders(path.parent)]
    return [bare.partition(".")[0], *(f"{above}{name}" for above in ("", *folders) for name in (stem, path.name))]


def _with_folders(folder: Path) -> list[str]:
    """Returns the folder's name, then its name with one folder above it, with two, and so on."""
    parts = folder.parts[1:]
    return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)] or [""]


def _distinct(longer: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """Returns each source's first name that no other source has, or its last name if all of its names are shared."""
    level = dict.fromkeys(longer, 0)
    while True:
        names = {source: longer[source][index] for source, index in level.items()}
        count = Counter(names.values())
        shared = [s for s, name in names.items() if count[name] > 1 and level[s] + 1 < len(longer[s])]
        if not shared:
            return names
        for source in shared:
            level[source] += 1
