"""regrow demo."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click

from regrow_toolchain.pages import table

from ..options import emit, force_option, json_option, out_option
from ..tables import percent, size


@click.command("demo")
@out_option("Folder for models, adapters, bundles and the report; a fresh one by default.",
            required=False)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of everything random.")  # fmt: skip
@force_option
@json_option
def demo_command(out: Path | None, seed: int, force: bool, as_json: bool) -> None:
    """See the whole of regrow work on real handwriting, with a report.

    Trains a small vision transformer on scikit-learn's digits, compresses it to half, trains an
    adapter of a few kilobytes for each of four made users, exports all of it to ONNX, and swaps
    through the users in a process that has no torch. Takes about a minute on two cores.
    """
    from regrow_toolchain.extras import require_extra

    require_extra("train", "regrow demo")
    from regrow_toolchain.demo import DemoSettings, run_demo

    folder = out or _fresh()
    report = run_demo(
        folder,
        DemoSettings.with_seed(seed),
        force=force,
        say=lambda line: click.echo(line, err=True),
    )
    emit(report, _lines(report, folder), as_json=as_json)


def _fresh() -> Path:
    """regrow-demo, or with the first number that is free."""
    names = itertools.chain(["regrow-demo"], (f"regrow-demo-{n}" for n in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())


def _lines(report: dict[str, Any], folder: Path) -> list[str]:
    backbone, device = report["backbone"], report["device"]
    rows = [
        [
            user["title"],
            f"{percent(user['before'])} ± {100 * user['before_se']:.1f}",
            f"{percent(user['after'])} ± {100 * user['after_se']:.1f}",
            f"{100 * user['gain']:+.1f} ± {100 * user['gain_se']:.1f}",
            f"{user['adapter_bytes']:,}"
            + (f" + {user['head_bytes']:,}" if user["own_head"] else ""),
            f"{user['swap_ms']['cold']:.2f} / {user['swap_ms']['cached']:.2f} / "
            f"{user['swap_ms']['resident']:.4f}",
            f"{user['parity_max_abs']:.0e}",
        ]
        for user in report["users"]
    ]
    head = ["user (made)", "before", "after", "points", "bytes (+ head)",
            "swap ms: cold / cached / resident", "max |Δ|"]  # fmt: skip
    latency = device["latency_ms"]
    private, peak = (
        size(count) if count else "not measured"
        for count in (device["memory"][-1]["rss_anon"], device["peak_bytes"])
    )
    return [
        "",
        *table(head, rows),
        f"± is one standard error, over {report['data']['test']} test signs per user",
        "",
        f"model      {percent(backbone['dense']['accuracy'])} dense, "
        f"{percent(backbone['compressed']['accuracy'])} compressed: "
        f"{size(backbone['dense']['bytes'])} to {size(backbone['compressed']['bytes'])}",
        f"latency    {latency['base']['p50']:.2f} ms base, {latency['adapter']['p50']:.2f} ms with "
        f"an adapter, {latency['merged']['p50']:.2f} ms merged, "
        f"{latency['seeded']['p50']:.2f} ms seeded (p50)",
        f"RAM        {private} private (RssAnon) with all adapters resident, peak {peak}; "
        "Python and ONNX Runtime included",
        *_failed(report),
        f"report     {folder / 'report.html'} ({report['seconds']:.0f} s)",
    ]


def _failed(report: dict[str, Any]) -> list[str]:
    return [
        f"NOT MET    {check['name']}: {check['limit']}, got {check['value']}"
        for check in report["checks"]
        if not check["ok"]
    ]
