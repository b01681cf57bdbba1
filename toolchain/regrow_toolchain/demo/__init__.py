"""`regrow demo`: the whole way on real handwriting, then a report.

Nothing is imported here: `device` runs in a process of its own, without torch.
"""
