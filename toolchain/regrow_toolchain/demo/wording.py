"""Numbers as a reader wants them, and the one-sentence takeaways of the report's charts.

Every sentence is computed and holds for any numbers: a loss is called a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_toolchain.pages import GAP, count, duration, percent, ratio, size

__all__ = [
    "accuracy_takeaway",
    "added_bytes",
    "bytes_takeaway",
    "checks_summary",
    "count",
    "duration",
    "latency_takeaway",
    "mean",
    "memory_takeaway",
    "percent",
    "platform_bytes",
    "plus_minus",
    "points",
    "ratio",
    "same_labels",
    "signed_size",
    "size",
    "size_range",
    "swap_takeaway",
    "users_words",
]

# Stages of `device.memory` before the first bundle is opened: what any user of ONNX Runtime pays.
PLATFORM_STAGES = 2
Numbers = Mapping[str, Any]


def points(share: float) -> str:
    """A difference of shares in signed percentage points: +29.0 points, −1.5 points."""
    value = round(100 * share, 1)
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{abs(value):.1f}{GAP}points"


def plus_minus(share: float, error: float) -> str:
    """A share with one standard error: 91.0% ± 1.3."""
    return f"{percent(share)} ± {100 * error:.1f}"


def size_range(values: Sequence[float]) -> str:
    """The smallest and the largest of some sizes in bytes, once where they read the same."""
    low, high = size(min(values)), size(max(values))
    if low == high:
        return low
    number, unit = low.split()
    return f"{number if high.endswith(unit) else low} to {high}".replace(" ", GAP)


def signed_size(value: int | None) -> str:
    """A difference of bytes: +12 MB, −1.0 MB, not measured."""
    if value is None or value == 0:
        return size(value)
    return f"{'+' if value > 0 else '−'}{size(abs(value))}"


def users_words(number: int) -> str:
    """A number of users in words: 1 user, 4 users."""
    return f"{number}{GAP}{'user' if number == 1 else 'users'}"


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers; there is at least one."""
    return sum(values) / len(values)


def same_labels(users: Sequence[Numbers]) -> tuple[Sequence[Numbers], str]:
    """The users that means are taken over, and the words that say so.

    With other labels nobody can be right before the adapter, so that gain would flatter the mean.
    """
    kept = [user for user in users if not user["own_head"]]
    if not kept or len(kept) == len(users):
        return users, ""
    return kept, "where the labels stay the same, "


def accuracy_takeaway(users: Sequence[Numbers]) -> str:
    """Who gains and who does not; clear means more than two standard errors."""
    worse = [u["title"] for u in users if u["gain"] < -2 * u["gain_se"]]
    better = sum(u["gain"] > 2 * u["gain_se"] for u in users)
    unclear = len(users) - len(worse) - better
    kept, where = same_labels(users)
    average = f"{where}{points(mean([u['gain'] for u in kept]))} on average"
    if better == len(users):
        before, after = (mean([u[key] for u in kept]) for key in ("before", "after"))
        move = f"from {percent(before)} to {percent(after)}"
        return f"Every user gains with their own adapter; {average}, {move}."
    parts = [f"{better} of {len(users)} users gain clearly"]
    if worse:
        parts.append(f"worse with the adapter: {', '.join(worse)}")
    if unclear:
        parts.append(f"no clear change for {unclear}")
    return "; ".join(parts) + f"; {average}."


def bytes_takeaway(sizes: Numbers) -> str:
    """What one adapter takes, and how much the others take against it."""
    one = sizes["adapter"]
    return (
        f"One adapter takes {size(one)}: a full model is {ratio(one, sizes['dense_model'])} times "
        f"that, a LoRA {ratio(one, sizes['lora'])} times, "
        f"an int4 LoRA {ratio(one, sizes['lora_int4'])} times."
    )


def swap_takeaway(swap: Numbers) -> str:
    """Median times of a swap, in RAM and from disk."""
    return (
        f"Changing the user takes {duration(swap['resident']['p50'])} when the adapter is in RAM, "
        f"and {duration(swap['cold']['p50'])} from disk with nothing prepared."
    )


def latency_takeaway(latency: Numbers) -> str:
    """What an adapter costs in one run, against the base (medians)."""
    base, adapted = latency["base"]["p50"], latency["adapter"]["p50"]
    change = round(100 * (adapted / base - 1)) if base > 0 else 0
    against = (
        "as long as" if change == 0 else f"{abs(change)}% {'more' if change > 0 else 'less'} than"
    )
    return (
        f"One run with an adapter takes {duration(adapted)} at the median, "
        f"{against} the model without one."
    )


def memory_takeaway(stages: Sequence[Numbers]) -> str:
    """What Python and ONNX Runtime take, and what the bundle and its adapters add."""
    platform, added = platform_bytes(stages), added_bytes(stages)
    if added is None:
        return "Memory by stage was not measured: this system does not tell."
    change = f"adds {size(added)}" if added >= 0 else f"gives {size(-added)} back"
    return f"Python and ONNX Runtime take {size(platform)}; the bundle with its adapters {change}."


def added_bytes(stages: Sequence[Numbers]) -> int | None:
    """Private memory that came with the bundle and its adapters, or None if not measured."""
    last, platform = stages[-1]["rss_anon"], platform_bytes(stages)
    return None if last is None or platform is None else last - platform


def platform_bytes(stages: Sequence[Numbers]) -> int | None:
    """Private memory before any bundle is open, or None where it was not measured."""
    before = [stage["rss_anon"] for stage in stages[:PLATFORM_STAGES]]
    return before[-1] if before else None


def checks_summary(checks: Sequence[Numbers]) -> str:
    """How many checks passed, in words."""
    passed = sum(bool(check["ok"]) for check in checks)
    if not checks:
        return "No checks were made"
    if passed == len(checks):
        return f"All {passed} checks passed"
    return f"{passed} of {len(checks)} checks passed, {len(checks) - passed} failed"
