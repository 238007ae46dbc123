"""Names of handles as names of folders."""

from __future__ import annotations

import hashlib
import re


def file_name(name: str) -> str:
    """A role's name as the name of a folder, two names never the same."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
