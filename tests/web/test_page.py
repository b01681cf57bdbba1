"""examples/web's page: its preprocessing, what serve.py gives and refuses, and a look in Chromium.

The last needs chromium, and npm with a registry for onnxruntime-web and playwright-core.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_export import ExportSource, export_bundle
from regrow_inputs import ImagePreprocessor
from regrow_runtime import Adapter, Head, HeadLayer

pytestmark = pytest.mark.slow

PLAYWRIGHT = "playwright-core@1.65.1"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {
    "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5], "image_std": [0.5],
}  # fmt: skip
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


# -- preprocessing --------------------------------------------------------------------------------


def _node(room: Path, *arguments: object) -> Any:
    done = subprocess.run(
        ["node", "page.mjs", *map(str, arguments)],
        cwd=room, capture_output=True, text=True, timeout=60, check=False, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_images_come_out_as_on_the_device(room, tmp_path):
    edge = {"size": {"shortest_edge": 19}, "do_center_crop": True, "crop_size": 16, **COLOURS}
    cases = [
        (SETTINGS, 1, (8, 8, 1)),
        (SETTINGS, 1, (256, 256, 3)),  # a drawing
        (SETTINGS, 1, (5, 30, 1)),
        ({**SETTINGS, "do_normalize": False, "do_rescale": False}, 3, (20, 20, 1)),
        ({**SETTINGS, "do_resize": False, "do_center_crop": True, "crop_size": 11}, 1, (8, 15, 1)),
        *(({**SETTINGS, **edge, "resample": number}, 3, (31, 50, 3)) for number in (1, 2, 3, 4)),
    ]
    rng, request, wanted = np.random.default_rng(0), [], []
    for number, (settings, channels, shape) in enumerate(cases):
        image, config = rng.integers(0, 256, shape, np.uint8), {"num_channels": channels}
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps(config))
        wanted.append(ImagePreprocessor.from_folder(folder)([image]))
        height, width, depth = shape
        request.append(
            {
                "settings": settings,
                "config": config,
                "image": {
                    "data": image.ravel().tolist(),
                    "height": height,
                    "width": width,
                    "channels": depth,
                },
            }
        )
    (tmp_path / "cases.json").write_text(json.dumps(request))
    for case, found, pixels in zip(cases, _node(room, "images", tmp_path), wanted, strict=True):
        assert found["dims"] == list(pixels.shape), case
        values = np.array(found["values"], dtype=np.float32).reshape(pixels.shape)
        np.testing.assert_array_equal(values, pixels, err_msg=str(case))


# -- serve.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tour(vit: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `regrow demo -o tour` writes, small: `left` says x and `right` says z to everything."""
    folder = tmp_path_factory.mktemp("tour")
    export_bundle(vit, folder / "bundle")
    (folder / "bundle" / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    (folder / "bundle" / "config.json").write_text(json.dumps({"num_channels": 1}))
    for name in ("adapters", "users"):
        (folder / name).mkdir()
    rng = np.random.default_rng(3)
    for name, bias in (("left", [9, 0, 0]), ("right", [0, 0, 9])):
        layer = HeadLayer("classifier", np.zeros((3, 32), np.float32), np.array(bias, np.float32))
        head = Head((layer,), ("x", "y", "z"))
        adapter = Adapter("head", {}, 0, vit.backbone_id, (), {}, "fp16", head=head)
        adapter.save(folder / "adapters" / f"{name}.safetensors")
        np.savez(
            folder / "users" / f"{name}-test.npz",
            images=rng.integers(0, 256, (40, 8, 8), np.uint8),
            labels=np.repeat(["z", "y", "x", "w"], 10),
        )
    other = replace(adapter, backbone_id="sha256:" + "cd" * 32)
    other.save(folder / "adapters" / "foreign.safetensors")
    (folder / "report.json").write_text('{"users": [{"id": "right", "condition": "said"}]}')
    (folder.parent / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(folder.parent / "secret.json")
    return folder


@contextmanager
def _serving(web: Path, folder: Path) -> Iterator[int]:
    """Its port."""
    with subprocess.Popen(
        [sys.executable, web / "serve.py", folder, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.match(r"http://localhost:(\d+)/", line)
            assert found, line
            yield int(found[1])
        finally:
            server.terminate()


def _get(port: int, path: str) -> tuple[int, str, bytes]:
    """Status, type and body of exactly this path: http.client does not tidy it up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def port(room: Path, tour: Path) -> Iterator[int]:
    with _serving(room, tour) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/index.html", "text/html"),
        ("/page.js", "text/javascript"),
        ("/style.css?1", "text/css"),
        ("/tour/bundle/manifest.json", "application/json"),
        ("/tour/bundle/backbone.onnx", "application/octet-stream"),
        ("/tour/adapters/left.safetensors", "application/octet-stream"),
    ],
)
def test_what_is_served(port, room, tour, path, kind):
    status, given, body = _get(port, path)
    assert (status, given.partition(";")[0]) == (200, kind)
    name = path.partition("?")[0].lstrip("/") or "index.html"
    file = tour / name.removeprefix("tour/") if name.startswith("tour/") else room / name
    assert body == file.read_bytes()


def test_the_engine_is_served_with_the_types_that_browsers_ask_for(installed, port):
    dist = "/node_modules/onnxruntime-web/dist"
    script = _get(port, f"{dist}/ort.wasm.bundle.min.mjs")
    assert script[:2] == (200, "text/javascript; charset=utf-8")
    assert _get(port, f"{dist}/ort-wasm-simd-threaded.wasm")[:2] == (200, "application/wasm")


@pytest.mark.parametrize(
    "path",
    [
        "/tour/../secret.json",
        "/tour/%2e%2e/secret.json",
        "/tour/..%2fsecret.json",
        "/tour/bundle/../../secret.json",
        "/tour/..\\secret.json",
        "/tour//etc/passwd",
        "/tour/%2Fetc/passwd",
        "/tour/link.json",
        "/tour/%00",
        "/tour/" + "a" * 3000,
        "/tour/", "/tour", "/tour/bundle", "/tour/bundle/",
        "/../page.js", "//etc/passwd", "/etc/passwd",
        "/serve.py", "/package.json", "/node.mjs",
        "/node_modules/", "/node_modules/onnxruntime-web/package.json",
        "/node_modules/onnxruntime-web/dist/../package.json",
        "/node_modules/onnxruntime-web/dist/../../../page.js",
        "/tour/none.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(port, path):
    assert _get(port, path)[0] == 404


def test_samples(port):
    status, kind, body = _get(port, "/samples.json")
    assert (status, kind) == (200, "application/json")
    found = json.loads(body)
    assert [user["name"] for user in found["users"]] == ["right", "foreign", "left"]
    right, foreign, left = found["users"]
    assert (right["about"], left["about"], foreign["samples"]) == ("said", "", [])
    assert left["adapter"] == "tour/adapters/left.safetensors"
    assert [sample["label"] for sample in left["samples"]] == sorted("wwwxxxyyzz")
    sample = left["samples"][0]
    assert (sample["height"], sample["width"], sample["channels"]) == (8, 8, 1)
    assert len(sample["pixels"]) == 64


def test_samples_that_cannot_be_read_are_named(room, tour, tmp_path):
    folder = shutil.copytree(tour, tmp_path / "tour", symlinks=True)
    (folder / "users" / "left-test.npz").write_bytes(b"no zip")
    with _serving(room, folder) as port:
        status, _, body = _get(port, "/samples.json")
    assert status == 500
    assert json.loads(body)["error"]


def test_a_folder_without_a_bundle_is_refused_with_the_way_out(room, tmp_path):
    done = subprocess.run(
        [sys.executable, room / "serve.py", tmp_path / "none"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "regrow demo -o" in done.stderr


# -- the page -------------------------------------------------------------------------------------


def test_the_page_in_a_browser(installed, npm_install, port):
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed")
    npm_install("--no-save", PLAYWRIGHT)
    found = _node(installed, "drive", f"http://localhost:{port}/", chromium)
    assert found["errors"] == []
    assert set(found["hosts"]) == {f"localhost:{port}"}
    base, again = found["answers"][""]
    assert base == again
    assert base in "abcd"
    assert (found["answers"]["left"], found["answers"]["right"]) == (["x"], ["z"])
    assert "backbone_id must be sha256:abab" in found["refused"]
    assert re.fullmatch(r"[a-d], [\d.]+ %", found["drawn"])
    assert found["width"] <= 360
