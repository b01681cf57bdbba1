"""A bundle's graph in its session: what it is fed is checked, what it says is explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike, NDArray

from regrow_format.errors import RegrowError, UsageError
from regrow_format.manifest import Manifest

from .sessions import first_line
from .slots import Feeds

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["GraphRunner"]


class GraphRunner:
    """Runs the bundle's first graph; any number of threads may.

    Args:
        options: given to every run.
    """

    def __init__(
        self,
        manifest: Manifest,
        session: ort.InferenceSession,
        options: ort.RunOptions | None = None,
    ) -> None:
        self.graph, self.session = manifest.graphs[0], session
        self._cache, self._options = manifest.cache, options
        self._outputs = [spec.name for spec in self.graph.outputs]

    def checked(self, inputs: Mapping[str, ArrayLike]) -> Feeds:
        """An array per graph input, in its dtype.

        Raises:
            UsageError: there are others, or one does not fit.
        """
        if self._cache is not None:
            inputs = self._cache.filled(inputs)
        feeds: Feeds = {}
        for spec in self.graph.inputs:
            if spec.name not in inputs:
                raise UsageError(f"inputs must have {spec.name}, got {sorted(inputs)}")
            feeds[spec.name] = spec.taken(inputs[spec.name])
        if unknown := set(inputs) - set(feeds):
            raise UsageError(f"inputs must be {sorted(feeds)}, got also {sorted(unknown)}")
        return feeds

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays by output name, of all outputs or those named; a cache starts empty.

        Raises:
            UsageError: there is no such output.
            RegrowError: ONNX Runtime failed; its reason is in the message.
        """
        names = self._outputs if outputs is None else self._chosen(outputs)
        if self._cache is not None:
            feeds = feeds | self._cache.empty(len(feeds[self._cache.inputs["input_ids"]]))
        return dict(zip(names, self.call(names, feeds), strict=True))

    def _chosen(self, outputs: Sequence[str]) -> list[str]:
        names = list(outputs)
        if not names or not set(names) <= set(self._outputs):
            raise UsageError(f"outputs must be among {self._outputs}, got {names}")
        return names

    def call(self, names: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
        """The outputs called `names`, in their order; `feeds` are taken as they are."""
        try:
            values: list[NDArray[Any]] = self.session.run(names, feeds, self._options)
        except Exception as error:
            raise self._explained(error, feeds) from error
        return values

    def _explained(self, error: Exception, feeds: Feeds) -> RegrowError:
        shapes = ", ".join(f"{s.name} {list(feeds[s.name].shape)}" for s in self.graph.inputs)
        reason = first_line(error)
        if "allocate" in reason:  # as ONNX Runtime says it
            return RegrowError(
                f"memory must suffice for {shapes}, got less: run fewer samples at once, or "
                f'open the bundle with profile="memory" ({reason})'
            )
        if "out of data bounds" in reason:
            reason = f"ids must lie below the size of the vocabulary ({reason})"
        return RegrowError(f"model must take these inputs, got {shapes}: {reason}")
