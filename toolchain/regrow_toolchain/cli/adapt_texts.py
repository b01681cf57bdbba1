"""What `regrow adapt` says: for one user, and for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regrow_toolchain.pages import table

from .tables import score, size

if TYPE_CHECKING:
    from regrow_toolchain.adapters import Adapted, Verdict

__all__ = ["named_score", "no_gain", "none_gains", "result_lines", "user_lines"]

_SHOWN = 20


def no_gain(done: Adapted) -> str:
    """Why an adapter was refused, and what to do."""
    from regrow_toolchain.adapters import FEWEST_GROUPS

    verdict = done.verdict
    assert verdict is not None  # without one nothing is refused
    where = f"{done.samples} samples held back" + (f" in {done.folds} folds" if done.folds else "")
    if verdict.groups < FEWEST_GROUPS:
        return (
            f"data must hold back {FEWEST_GROUPS} different samples or more to tell whether an "
            f"adapter improves, got {verdict.groups}: give more samples (--keep-anyway writes it)"
        )
    return (
        f"adapter must be better than none to be written, got {_gain(verdict)} on {where}: give "
        "more samples, or try --steps, --lr or another --method (--keep-anyway writes it)"
    )


def _gain(verdict: Verdict) -> str:
    """What was found, score and test."""
    from regrow_toolchain.adapters import SIGNIFICANCE

    before, after = (score(value, verdict.metric) for value in (verdict.before, verdict.after))
    return (
        f"{verdict.metric} {before} before and {after} after, and a loss of "
        f"{verdict.loss_after:.3g} beside {verdict.loss_before:.3g} of the {verdict.baseline} "
        f"({_p(verdict.p_value)}, must be at most {SIGNIFICANCE})"
    )


def named_score(value: float | None, metric: str) -> str:
    """The score, with its metric."""
    shown = score(value, metric)
    return shown if shown == "no score" else f"{metric} {shown}"


def _test(gate: dict[str, Any] | None) -> str:
    if not gate:
        return ""
    found = f" ({_p(gate['p_value'])} against the {gate['baseline']})"
    return found if gate["improves"] else f"{found}: not shown to be better than none"


def _p(value: float) -> str:
    """A p-value; drawn sign patterns tell nothing below a thousandth."""
    return "p < 0.001" if value < 1e-3 else f"p = {value:.2g}"


def result_lines(result: dict[str, Any]) -> list[str]:
    """Head, scores and file of one user's adapter."""
    eval_data, metric = result["samples"]["held_back"], result["metric"]
    folds = result["samples"]["folds"]
    how = (
        f"{eval_data} samples, each held back in one of {folds} folds"
        if folds
        else (f"{eval_data} held-back samples")
    )
    scores = (
        f"{named_score(result['before'], metric)} before, {score(result['after'], metric)} after, "
        f"on {how}{_test(result['gate'])}"
        if eval_data
        else "no samples held back, so no score"
    )
    labels = result["labels"] or []
    names = ", ".join(labels[:_SHOWN]) + (" …" if len(labels) > _SHOWN else "")
    kept = "the head is the backbone's (--head new trains one of the user's own)"
    return [
        f"the adapter has a head of its own: {names}" if labels else kept,
        scores,
        f"wrote {result['out']}: {size(result['bytes'])}, {result['method']} in "
        f"{result['storage']}, {result['targets']} layers"
        + (f", own head of {len(labels)} outputs" if labels else ""),
    ]


def user_lines(result: dict[str, Any]) -> list[str]:
    """A table of users, and what they have on average."""
    metric = result["metric"]
    rows = [
        (
            row["user"],
            score(row["before"], metric),
            score(row["after"], metric),
            str(row["held_back"]),
            "" if row["p_value"] is None else _p(row["p_value"]),
            size(row["bytes"]) if row["file"] else ("stopped" if row["stopped"] else "not written"),
        )
        for row in result["adapters"]
    ]
    hidden = [f"… {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    refused = result["users"] - result["written"]
    wrote = (
        f"wrote {result['out']}: {result['written']} adapters, {size(result['bytes'])}, "
        f"{result['method']} in {result['storage']}"
        + (
            f"; {refused} not written: not shown to be better than none (--keep-anyway)"
            if refused
            else ""
        )
    )
    return [
        *table(("user", f"{metric} before", "after", "samples", "test", "file"), rows[:_SHOWN]),
        *hidden,
        f"{'' if metric.startswith('mean ') else 'mean '}"
        f"{named_score(result['before'], metric)} before, "
        f"{named_score(result['after'], metric)} after ({result['users']} users)",
        *([wrote] if result["written"] else []),
    ]


def none_gains(result: dict[str, Any]) -> str:
    """Why nobody's adapter was written, and what to do."""
    return (
        f"adapters must be better than none to be written (p at most 0.02), got none that is, of "
        f"{result['users']} users: {result['out']} was not written; give more samples, or try "
        "--steps, --lr or another --method (--keep-anyway writes them)"
    )
