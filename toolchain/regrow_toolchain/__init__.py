"""regrow's workshop: compress a model, train adapters, export them, and the command line.

Each sub-package's `__init__` is its table of contents, and what others use of it. `import regrow`
has what an application needs. Imports point one way: cli, demo -> verification, interop, compress,
adapters, profiling -> training -> tasks -> data -> models.
"""
