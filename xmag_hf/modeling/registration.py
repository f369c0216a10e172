"""Makes the Auto classes of transformers know XMAG, as late as possible.

`import xmag_hf` must be enough for `AutoModel.from_pretrained("xmag")`, and must not cost the
seconds that torch and transformers take to import (`xmag --help`). So each Auto class gets its
entries when the module that defines it is loaded: at once if it is already, else right after its
import, whoever imports it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


def register_auto_classes() -> None:
    """Register configurations, models, classifiers and image processor with the Auto classes.

    Safe to call twice. That a saved folder holds the code and an `auto_map` for it is a property
    of the classes (`_auto_class`, what `register_for_auto_class` sets), not of this call.
    """
    for name, (_, register) in _REGISTRATIONS.items():
        importlib.import_module(name)
        register()


def register_when_transformers_loads() -> None:
    """Like `register_auto_classes`, but importing nothing that is not imported yet."""
    waiting = {}
    for name, (ours, register) in _REGISTRATIONS.items():
        if name in sys.modules:
            register()
        else:
            waiting[name] = (ours, register)
    if waiting:
        sys.meta_path.insert(0, _RegisterAfterImport(waiting))


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_xmag import XMAGConfig
    from .configuration_xmag_abmil import XMAGABMILConfig, XMAGMeanPoolConfig
    from .configuration_xmag_lite import XMAGLiteConfig
    from .configuration_xmag_slide import XMAGSlideConfig

    heads = (XMAGABMILConfig, XMAGMeanPoolConfig, XMAGSlideConfig)
    for config in (XMAGConfig, XMAGLiteConfig, *heads):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageClassification

    from .configuration_xmag import XMAGConfig
    from .configuration_xmag_abmil import XMAGABMILConfig, XMAGMeanPoolConfig
    from .configuration_xmag_lite import XMAGLiteConfig
    from .configuration_xmag_slide import XMAGSlideConfig
    from .modeling_xmag import XMAGForImageClassification, XMAGModel
    from .modeling_xmag_abmil import XMAGABMILModel, XMAGMeanPoolModel
    from .modeling_xmag_lite import XMAGLiteForImageClassification, XMAGLiteModel
    from .modeling_xmag_slide import XMAGForSlideClassification

    AutoModel.register(XMAGConfig, XMAGModel, exist_ok=True)
    AutoModel.register(XMAGLiteConfig, XMAGLiteModel, exist_ok=True)
    AutoModel.register(XMAGABMILConfig, XMAGABMILModel, exist_ok=True)
    AutoModel.register(XMAGMeanPoolConfig, XMAGMeanPoolModel, exist_ok=True)
    AutoModel.register(XMAGSlideConfig, XMAGForSlideClassification, exist_ok=True)
    classifier = AutoModelForImageClassification
    classifier.register(XMAGConfig, XMAGForImageClassification, exist_ok=True)
    classifier.register(XMAGLiteConfig, XMAGLiteForImageClassification, exist_ok=True)


def _register_image_processors() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_xmag import XMAGConfig
    from .configuration_xmag_lite import XMAGLiteConfig
    from .configuration_xmag_slide import XMAGSlideConfig
    from .image_processing_xmag import XMAGImageProcessor

    # One class for both backends: it needs neither torchvision nor a variant without it.
    backends: dict[str, type] = {"torchvision": XMAGImageProcessor, "pil": XMAGImageProcessor}
    for config in (XMAGConfig, XMAGLiteConfig, XMAGSlideConfig):
        AutoImageProcessor.register(config, image_processor_classes=dict(backends), exist_ok=True)


_NAMES = ("xmag", "xmag_lite", "xmag_abmil", "xmag_slide")
_MODELS = tuple(f"{__package__}.modeling_{name}" for name in _NAMES)
_PROCESSORS = (f"{__package__}.image_processing_xmag",)

# Module that defines an Auto class -> (modules of ours that import it themselves, registration).
_REGISTRATIONS: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    "transformers.models.auto.configuration_auto": ((), _register_configs),
    "transformers.models.auto.modeling_auto": (_MODELS, _register_models),
    "transformers.models.auto.image_processing_auto": (_PROCESSORS, _register_image_processors),
}


class _RegisterAfterImport(MetaPathFinder):
    """Finds nothing itself; runs a registration once its Auto class and our modules are loaded.

    Our modules are watched too: importing `modeling_xmag` first makes transformers load the Auto
    classes half-way through it, when there is no `XMAGModel` to register yet.
    """

    def __init__(self, waiting: dict[str, tuple[tuple[str, ...], Callable[[], None]]]):
        self.waiting = waiting
        self.watched = set(waiting).union(*(ours for ours, _ in waiting.values()))
        self.executing: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's ordinary spec, its loader followed by the registrations that are ready."""
        if fullname not in self.watched:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.executing.add(fullname)
            try:
                execute(module)
            finally:
                self.executing.discard(fullname)
            self._register_ready()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def _register_ready(self) -> None:
        for name in list(self.waiting):
            ours, register = self.waiting.get(name, ((), None))  # a registration imports, too
            ready = name in sys.modules and not self.executing.intersection((name, *ours))
            if register and ready:
                del self.waiting[name]
                register()
