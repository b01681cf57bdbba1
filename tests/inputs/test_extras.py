"""The pip line of a missing extra works as it is typed, however regrow was installed."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from regrow_inputs import extras


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch):
    """line(direct_url): what is told of an install with this direct_url.json."""

    class Installed:
        def __init__(self, told: object) -> None:
            self._told = told

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return json.dumps(self._told) if self._told else None

    def call(told: object) -> str:
        monkeypatch.setattr(extras, "distribution", lambda _: Installed(told))
        return extras.pip_line("run")

    return call


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "my regrow"
    folder.mkdir()
    (folder / "constraints.txt").write_text("numpy==2.0\n")
    return folder


def test_from_a_repository_that_is_there(line, repository) -> None:
    told = {"url": repository.as_uri(), "dir_info": {}}
    source = f"'{repository}[run]' -c '{repository / 'constraints.txt'}'"
    assert line(told) == f"pip install {source}"
    assert line(told | {"dir_info": {"editable": True}}) == f"pip install -e {source}"


def test_from_elsewhere_pip_reads_what_is_installed(line, tmp_path) -> None:
    plain = "pip install 'regrow[run]'"
    assert line(None) == plain
    assert line({"url": (tmp_path / "gone").as_uri(), "dir_info": {}}) == plain
    assert line({"url": "https://example.org/regrow.whl", "archive_info": {}}) == plain


def test_without_an_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> None:
        raise PackageNotFoundError

    monkeypatch.setattr(extras, "distribution", none)
    assert extras.pip_line("run") == "pip install -e '.[run]' -c constraints.txt, in the repository"
