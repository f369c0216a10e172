"""Publishing: model cards, the licence chain behind them, student folders, push to the Hub.

Imports `xmag_hf.modeling` at most, and no torch: it is handed models and writes them.
"""

from .cards import AlignmentRow, CardFacts, render_card
from .folders import PublishError, push_folder, save_folder
from .head_cards import HeadCardFacts, render_head_card
from .licences import Licence, StudentLicence, find_licence, student_licence

__all__ = [
    "AlignmentRow",
    "CardFacts",
    "HeadCardFacts",
    "Licence",
    "PublishError",
    "StudentLicence",
    "find_licence",
    "push_folder",
    "render_card",
    "render_head_card",
    "save_folder",
    "student_licence",
]
