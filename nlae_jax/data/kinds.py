"""Names the kinds of text that the files of a corpus stand for, where its documents do not name them themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

_FEWEST_FOLDERS = 4  # of one document each, from which they count as their parent


def kinds_of_files(several: Sequence[Path], single: Sequence[Path]) -> dict[Path, str]:
    """Names the kind of each file: of those with several documents, and of those with a single one.

    A file with several documents is a kind of its own, by its name up to the first dot. Files with a single document
    are of the kind of their folder, by its name. Where two kinds would have one name, it is lengthened: by the rest of
    the file's name, then by folders.
    """
    folders = _folders(single)
    longer = {path: _file_names(path.absolute()) for path in several}
    longer |= {folder: _with_folders(folder) for folder in folders.values()}
    names = _distinct(longer)
    return {path: names[path] for path in several} | {path: names[folders[path]] for path in single}


def _folders(single: Sequence[Path]) -> dict[Path, Path]:
    """The folder of each file. Where every folder beside each other holds one file, it is the one that holds them.

    Otherwise a corpus of one folder per document would have as many kinds as documents.
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
    """Names of a file, shortest first. One that begins with a dot is named by what follows it."""
    bare = path.name.lstrip(".")
    stem = bare.removesuffix(".gz").rpartition(".")[0] or bare
    folders = [f"{above}/" for above in _with_folders(path.parent)]
    return [bare.partition(".")[0], *(f"{above}{name}" for above in ("", *folders) for name in (stem, path.name))]


def _with_folders(folder: Path) -> list[str]:
    """The folder's name, then with one folder above it, with two, and so on."""
    parts = folder.parts[1:]
    return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)] or [""]


def _distinct(longer: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """For each source the first of its names with which it differs from all others, as far as there is one."""
    level = dict.fromkeys(longer, 0)
    while True:
        names = {source: longer[source][index] for source, index in level.items()}
        count = Counter(names.values())
        shared = [s for s, name in names.items() if count[name] > 1 and level[s] + 1 < len(longer[s])]
        if not shared:
            return names
        for source in shared:
            level[source] += 1
