"""Finding one's way in a model: its stacks of blocks, its head, its module paths."""

from __future__ import annotations

from torch import nn

from regrow_export.layers import block_lists

__all__ = ["block_lists", "find_head", "replace_module"]


def find_head(model: nn.Module, classes: int | None) -> tuple[str, ...]:
    """Module paths of the head's linear layers, first to last: the last ones outside the blocks.

    A head of two layers (`classifier.dense`, `classifier.out_proj`, or DistilBERT's
    `pre_classifier`, `classifier`) is found whole. Several heads side by side, such as those of
    DeiT with a teacher, whose answers are averaged, are none: no single layer could take the
    place of one.

    Args:
        classes: the outputs that the head must have; None if they are not known. Then it must
            come after the blocks.
    """
    stacks = tuple(f"{prefix}." for prefix, _ in block_lists(model))
    names = [name for name, _ in model.named_modules()]
    start = max((i for i, n in enumerate(names) if stacks and n.startswith(stacks)), default=-1)
    behind = set(names[start + 1 :])
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (stacks and name.startswith(stacks))
    }
    if classes is None:
        last = [name for name in linears if name in behind]
    else:
        last = [name for name, module in linears.items() if module.out_features == classes]
    if not last:
        return ()
    name = last[-1]
    near = {n: m for n, m in linears.items() if n in behind or name not in behind}
    if _side_by_side(near, name, surely_chained=classes is None):
        return ()
    parent = name.rpartition(".")[0]
    if not stacks:
        return (name,)
    return tuple(
        other
        for other in near
        if other.rpartition(".")[0] == parent and (parent or other.endswith(name))
    )


def _side_by_side(linears: dict[str, nn.Linear], last: str, *, surely_chained: bool) -> bool:
    """Whether the layer before the last one takes the same input and gives as many outputs.

    They have one parent and equal widths, and cannot be a chain, since the one does not give what
    the other takes. Where it does, only names can tell (DistilBERT's chain is `pre_classifier`,
    `classifier`), unless it is `surely_chained`.
    """
    parent = last.rpartition(".")[0]
    siblings = [name for name in linears if name.rpartition(".")[0] == parent]
    if siblings[-1] != last or len(siblings) < 2:
        return False
    one, two = linears[siblings[-2]], linears[last]
    if (one.in_features, one.out_features) != (two.in_features, two.out_features):
        return False
    chain = surely_chained or parent or siblings[-2].endswith(last)
    return two.in_features != two.out_features or not chain


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the module path `name`, keeping the model's mode."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    module.train(owner.training)
    setattr(owner, child, module)  # also right for the digits of a list: torch keeps both alike
