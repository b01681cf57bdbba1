"""Run the comparisons with peers, each in a virtual environment of its own.

    python examples/benchmarks/peers/run.py [NAME ...] [--small] [--here] [--room FOLDER] [-o FILE]

Names are swap, steady, user_bytes, basis; all of them by default. `--here` takes the packages of
this interpreter instead of making environments. The room keeps environments and models, so that a
second run goes faster. `-o` writes every script's last line as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NAMES = ("user_bytes", "basis", "swap", "steady")


def interpreter(name: str, room: Path) -> str:
    """A virtual environment with exactly the versions of `requirements/NAME.txt`."""
    folder = room / f"venv-{name}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True, clear=True)
        needed = HERE / "requirements" / f"{name}.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", needed], check=True)
        (folder / "complete").touch()
    return str(python)


def run(name: str, python: str, room: Path, small: bool) -> dict[str, object]:
    paths = [str(ROOT / part) for part in ("runtime", "export", "toolchain")]
    command = [
        python,
        str(HERE / f"{name}.py"),
        "--room",
        str(room),
        *(["--small"] if small else []),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    print(
        f"== {name} ({time.monotonic() - start:.0f} s)\n{done.stdout.rpartition(chr(10) + '{')[0]}"
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--here", action="store_true", help="no virtual environments")
    parser.add_argument("--room", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"names must be among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        room = (given.room or Path(temporary)).resolve()
        room.mkdir(parents=True, exist_ok=True)
        found = {}
        for name in given.names or NAMES:
            python = sys.executable if given.here else interpreter(name, room)
            found[name] = run(name, python, room, given.small)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
