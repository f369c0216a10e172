"""xmag_hf: distil a 20x pathology encoder into a 5x student, Hub-native.

Importing this package makes `AutoModel.from_pretrained`, `AutoConfig`, `AutoImageProcessor` and
`AutoModelForImageClassification` of transformers know XMAG.
"""

from xmag_hf._version import __version__
from xmag_hf.modeling.registration import register_when_transformers_loads

register_when_transformers_loads()

__all__ = ["__version__"]
