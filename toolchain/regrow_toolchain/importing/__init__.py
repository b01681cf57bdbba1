"""Adapters of other libraries, made regrow's: what they computed, in a file that devices read.

Everything here works in the base install: no torch, and none of the libraries that wrote them.
"""

from .peft import import_peft

__all__ = ["import_peft"]
