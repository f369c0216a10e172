"""How results look on screen and on disk: tables, pictures, JSON values, predictions as CSV.

Shared by the folders that report. Imports NumPy, matplotlib, rich, and of xmag_hf only
atomic_write and the version; matplotlib and rich are loaded where they are used.
"""
