"""Which files may be opened, and where what can be made again is kept."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .errors import FileFormatError

UNUSED_DAYS = 30  # for which what can be made again is kept


def regular(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a regular file: opening a pipe or a device might wait for ever.

    FileFormatError if it is anything else, OSError if it is not there.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileFormatError(f"{path} is not a regular file")
    return path


def cache_dir() -> Path:
    """Return the user's cache directory for this program, by the platform's custom.

    Compiled kernels and the converted demo model live there. A user without a home directory
    gets a private one among the temporary files.
    """
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in the user database
        user = os.getuid() if hasattr(os, "getuid") else 0
        base = Path(tempfile.gettempdir()) / f"powerinfer-{user}"
        base.mkdir(mode=0o700, exist_ok=True)
        if base.stat().st_uid != user:
            raise PermissionError(f"{base} belongs to somebody else; set XDG_CACHE_HOME") from None
    return Path(base) / "powerinfer-python"


def sweep(pattern: str) -> None:
    """Remove what nobody has used for UNUSED_DAYS from the cache directory: of older versions."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in cache_dir().glob(pattern):
        with suppress(OSError):
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder)
