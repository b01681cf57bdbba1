"""Serves this page with onnxruntime-web from node_modules, and a demo's folder under /tour/.

    regrow demo -o tour
    npm install                       in examples/web
    python examples/web/serve.py tour

Samples come from `users/<name>-test.npz` as /samples.json, with the adapters that the folder has:
a browser can neither list a folder nor read an .npz. Needs Python and numpy. It is for trying out:
a product serves these files as any web server does.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

WEB = Path(__file__).resolve().parent
ENGINE = "node_modules/onnxruntime-web/dist"
SAMPLES = 10  # per user, one of each label first
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".wav": "audio/wav",
}


def samples(folder: Path) -> dict[str, Any]:
    """The adapters in `folder`, and for each a few test images of its user, if there are any."""
    report, users = folder / "report.json", []
    known = json.loads(report.read_text("utf-8"))["users"] if report.is_file() else []
    about = {user["id"]: user["condition"] for user in known}
    order = list(about)  # the demo's own users first, as it has them
    for adapter in sorted(
        (folder / "adapters").glob("*.safetensors"),
        key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem),
    ):
        tests = folder / "users" / f"{adapter.stem}-test.npz"
        users.append({
            "name": adapter.stem,
            "about": about.get(adapter.stem, ""),
            "adapter": f"tour/adapters/{adapter.name}",
            "samples": images(tests) if tests.is_file() else clips(folder, adapter.stem),
        })  # fmt: skip
    return {"bundle": "tour/bundle", "users": users}


def clips(folder: Path, user: str) -> list[dict[str, Any]]:
    """The first of `test/USER/WORD/*.wav` for every word, as a file to ask for."""
    words = sorted(path for path in (folder / "test" / user).glob("*") if path.is_dir())
    firsts = [(word.name, min(word.glob("*.wav"), default=None)) for word in words]
    return [
        {"label": label, "wav": f"tour/{file.relative_to(folder).as_posix()}"}
        for label, file in firsts[:SAMPLES]
        if file
    ]


def images(path: Path) -> list[dict[str, Any]]:
    """Of an .npz with `images` uint8 [n, height, width] or [n, height, width, 3], and `labels`."""
    import numpy as np

    with np.load(path) as arrays:  # numpy refuses pickles by itself
        images, labels = arrays["images"], [str(label) for label in arrays["labels"]]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path}: images must be uint8 [n, height, width], got {images.shape}")
    seen: dict[str, int] = {}
    turns = []
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, index))
    return [
        {
            "label": label,
            "height": images.shape[1],
            "width": images.shape[2],
            "channels": images.shape[3] if images.ndim == 4 else 1,
            "pixels": images[index].ravel().tolist(),
        }
        for _, label, index in sorted(sorted(turns)[:SAMPLES], key=lambda turn: turn[1:])
    ]


def find(request: str, folder: Path, page: Path = WEB) -> Path | None:
    """The file for a request's path; None for all but the page, its engine and `folder`.

    What another `page` lacks comes from this folder.
    """
    path = unquote(urlsplit(request).path).lstrip("/") or "index.html"
    if path.startswith("tour/"):
        root, inside = folder, path.removeprefix("tour/")
    elif path.startswith(f"{ENGINE}/"):
        root, inside = WEB / ENGINE, path.removeprefix(f"{ENGINE}/")
    elif "/" not in path and Path(path).suffix in (".html", ".css", ".js"):
        root, inside = page if (page / path).is_file() else WEB, path
    else:
        return None
    if "\\" in inside or ":" in inside or "\0" in inside:
        return None
    try:  # resolved, so neither .. nor a link leads out of the folder
        file, root = (root / inside).resolve(), root.resolve()
        return file if file.is_relative_to(root) and file.is_file() else None
    except OSError:  # such as a name that is too long
        return None


class Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of the files that `find` allows; no listings."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, folder: Path, page: Path = WEB, **options: Any) -> None:
        self.folder, self.page = folder, page
        super().__init__(*arguments, **options)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a page that was closed while it loaded
            super().handle()

    def send_head(self) -> BytesIO | BinaryIO | None:
        if urlsplit(self.path).path == "/samples.json":
            return self.send_samples()
        if find(self.path, self.folder, self.page) is None:
            self.send_error(HTTPStatus.NOT_FOUND, "No such file here")
            return None
        return super().send_head()

    def send_samples(self) -> BytesIO:
        status, found = HTTPStatus.OK, {}
        try:
            found = samples(self.folder)
        except Exception as error:  # a broken .npz fails in many ways; the page says which
            status, found = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", TYPES[".json"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return BytesIO(body)

    def translate_path(self, path: str) -> str:
        return str(find(path, self.folder, self.page))

    def guess_type(self, path: Any) -> str:
        return TYPES.get(Path(path).suffix, "application/octet-stream")

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        # With these two a browser's clock is finer than 0.1 ms, and threads are allowed.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass  # only errors are printed

    def log_error(self, form: str, *arguments: Any) -> None:
        self.log_message(f"{form}, path %s", *arguments, getattr(self, "path", "?"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the page and a demo's folder.")
    parser.add_argument("folder", type=Path, help="what `regrow demo -o FOLDER` wrote")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one (%(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="0.0.0.0 lets a phone in the same network see the page, and everyone else in it",
    )  # fmt: skip
    parser.add_argument("--page", type=Path, default=WEB, help="a folder with another page")
    given = parser.parse_args()
    if not (given.page / "index.html").is_file():
        parser.error(f"page must be a folder with index.html, got {given.page}")
    if not (given.folder / "bundle" / "manifest.json").is_file():
        parser.error(
            f"folder must have bundle/manifest.json, got {given.folder}: "
            f"make it with `regrow demo -o {given.folder}`"
        )
    if not (WEB / ENGINE).is_dir():
        print(f"onnxruntime-web is missing: run `npm install` in {WEB}", file=sys.stderr)
    try:
        server = ThreadingHTTPServer(
            (given.host, given.port),
            partial(Handler, folder=given.folder.resolve(), page=given.page.resolve()),
        )
    except OSError as error:
        parser.error(f"port must be free, got {given.port}: {error.strerror}; try --port 0")
    shown = "localhost" if given.host in ("127.0.0.1", "0.0.0.0") else given.host
    print(f"http://{shown}:{server.server_address[1]}/ (stop with Ctrl-C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
