"""Finding one's way in a model: its stacks of blocks, its head, its module paths."""

from __future__ import annotations

from torch import nn

__all__ = ["block_lists", "find_head", "replace_module"]


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of two or more blocks of one class, with their module paths.

    That is how transformers and most plain models keep their encoder and decoder layers.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(module):
            found.append((name, module))
    return found


def _is_stack(modules: nn.ModuleList) -> bool:
    kinds = {type(module) for module in modules}
    has_weights = any(True for module in modules for _ in module.parameters())
    # A model of one layer is still a stack; a list of single linear layers is none.
    return len(kinds) == 1 and has_weights and not issubclass(next(iter(kinds)), nn.Linear)


def find_head(model: nn.Module, classes: int | None) -> tuple[str, ...]:
    """Module paths of the head's linear layers: those outside of the blocks that end in `classes`.

    For a model with a list of blocks the head is its last linear layer after them with `classes`
    outputs; a head of two layers (`classifier.dense`, `classifier.out_proj`, or DistilBERT's
    `pre_classifier`, `classifier`) is found whole.
    """
    stacks = [prefix for prefix, _ in block_lists(model)]
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(name.startswith(f"{prefix}.") for prefix in stacks)
    ]
    last = [name for name, module in linears if classes is None or module.out_features == classes]
    if not last or classes is None:
        return ()
    name = last[-1]
    parent = name.rpartition(".")[0]
    return tuple(
        other
        for other, _ in linears
        if other.rpartition(".")[0] == parent and (parent or other.endswith(name))
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the module path `name`, keeping the model's mode."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    module.train(owner.training)
    setattr(owner, child, module)  # also right for the digits of a list: torch keeps both alike
