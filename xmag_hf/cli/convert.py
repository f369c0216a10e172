"""Convert encoder weights (DINOv2, timm, released XMAG) to an XMAG folder."""

from __future__ import annotations

import argparse

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
    from xmag_hf.modeling.convert import convert_checkpoint, save_encoder

    model = convert_checkpoint(args.source, args.size)
    folder = save_encoder(model, args.out)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{folder}: {model.config.model_type}, {count:.1f}M parameters, checked against the source"
    )
    if not args.quiet:
        print(
            f'next: python -c "import xmag_hf; from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}')\""
        )
    return 0
