"""What a long step says of itself."""

from __future__ import annotations

import pytest

from regrow_toolchain.training import progress_bar as module


def test_without_a_terminal_a_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[str]:
        with module.progress("compress", 10, done=3) as advance:
            advance("loss 2")
            advance()
        return capsys.readouterr().err.splitlines()

    assert run() == []
    monkeypatch.setattr(module, "SECONDS", 0.0)
    assert run() == ["regrow: compress: 4 of 10; loss 2", "regrow: compress: 5 of 10"]
