"""`regrow profile`: what a bundle costs on this machine. Works in the base install.

Whatever is measured runs in a fresh process of its own (`worker.py`, `cases/`); this side plans
(`settings.py`), starts them (`processes.py`, `limits.py`), puts the record together (`record.py`)
and writes it (`text.py`, `page.py`). `compare.py` holds two records side by side.
"""
