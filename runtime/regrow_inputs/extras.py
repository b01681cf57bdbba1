"""The pip line that brings an extra, as it works when it is typed where regrow runs."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["pip_line"]

_CONSTRAINTS = "constraints.txt"


def pip_line(extra: str) -> str:
    """Such as "pip install 'regrow[run]'", for which pip reads what the installed regrow asks for.

    Where regrow was installed from a repository that is still there, it names that folder and its
    constraints, the versions that were tested together.
    """
    try:
        found = distribution("regrow")
    except PackageNotFoundError:  # run from the sources alone
        return f"pip install -e '.[{extra}]' -c {_CONSTRAINTS}, in the repository"
    told = json.loads(found.read_text("direct_url.json") or "{}")  # PEP 610
    folder = Path(url2pathname(urlsplit(told.get("url", "")).path))
    if "dir_info" not in told or not (folder / _CONSTRAINTS).is_file():
        return f"pip install 'regrow[{extra}]'"
    editable = "-e " if told["dir_info"].get("editable") else ""
    source = quote(f"{folder}[{extra}]")
    return f"pip install {editable}{source} -c {quote(str(folder / _CONSTRAINTS))}"
