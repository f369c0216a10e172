"""Convert encoder weights (DINOv2, timm, released XMAG) to an XMAG folder."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "xmag convert facebook/dinov2-base xmag-start --size base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare SOURCE, OUT and --size."""
    from xmag_hf.modeling.convert import DEFAULT_INIT

    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, file (.safetensors, .pth), Hub id, or timm:NAME; namings of transformers' "
        "DINOv2, timm, the DINOv2 hub, the released XMAG",
    )
    parser.add_argument("out", metavar="OUT", help="new folder, loadable with AutoModel")
    parser.add_argument(
        "--size", choices=list(DEFAULT_INIT), help="what the weights must be (default: detected)"
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Convert, save, say what was made."""
    from xmag_hf.encoders import weights_licence
    from xmag_hf.hub.cards import render_start_card
    from xmag_hf.hub.folders import save_folder
    from xmag_hf.modeling.convert import (
        convert_checkpoint,
        image_processor_for,
        is_xmag,
        source_folder,
    )

    model, source = convert_checkpoint(args.source, args.size), source_folder(args.source)
    model.config.licence = model.config.licence or weights_licence(args.source)
    kind, count, copied = model.config.model_type, model.num_parameters(), is_xmag(source)
    local = Path(args.source)
    name = local.name if local.exists() else args.source
    card = render_start_card(name, kind, count, model.config.licence, copied=copied)
    folder = save_folder(model, image_processor_for(model, source), card, args.out, replace=False)
    done = "an XMAG already, copied" if copied else "checked against timm's network"
    print(f"{folder}: {kind}, {count / 1e6:.1f}M parameters, {done}")
    if not args.quiet:
        print(
            f'next: python -c "import xmag_hf; from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}')\""
        )
    return 0
