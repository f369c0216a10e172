"""What trainings share: processes, checkpoints, the metrics file, stopping.

Imports nothing of ours. Import from the modules: this file imports nothing.
"""
