"""One process at a time makes an output: a lock beside it that ends with its process.

`.OUTPUT.lock` is there while OUTPUT is made. A process that was killed leaves the file, and not the
lock on it. Used by `parquet_parts.py`. Imports are the loader's.
"""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def locked(output: pathlib.Path) -> Iterator[None]:
    """Holds the lock of an output, and makes its folder where it is absent.

    Raises:
        FileExistsError: another call holds it, of this process or another one.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_name(f".{output.name}.lock")
    while True:
        with file.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileExistsError(
                    f"{output}: another process is making it; wait until it has ended."
                ) from error
            if _is_at(file, stream):
                try:
                    yield
                finally:
                    file.unlink(missing_ok=True)
                return


def _is_at(file: pathlib.Path, stream: IO) -> bool:
    """Whether an open file still has its name: whoever held it before has removed it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False
