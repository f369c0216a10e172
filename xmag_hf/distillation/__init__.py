"""Cross-magnification distillation: targets and their cache, augmentation, loss, EMA, trainer.

Import from the modules (`distillation.trainer`, `.loss`, `.alignment`, ...): this file imports
nothing, so that reading options costs no torch.
"""
