"""Folders that are being written: held by a lock while the writer lives, removed when it does not.

The kernel gives a lock back when its process ends, however it ends, and it is seen from every
container that shares the disk; a process number says neither. One of the loader's files (see
`manifest.py`).
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and holds it until the block ends; then removes what is left under its name.

    Raises:
        FileExistsError: another process, of the same number in its container, is writing it.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(f"{folder}: being written by another process; wait for it.") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system without locks: nobody can tell then, and nobody removes the folder.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: pathlib.Path, pattern: str) -> None:
    """Removes the folders of writers that were killed.

    Args:
        parent: where to look.
        pattern: regular expression of the whole name.
    """
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if re.fullmatch(pattern, folder.name) and folder.is_dir() and _is_free(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_free(folder: pathlib.Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
