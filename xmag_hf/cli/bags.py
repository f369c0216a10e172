"""Convert bags to and from the layouts of TRIDENT, CLAM and STAMP."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from xmag_hf.embedding.bag import BagError, read_bag, write_bag
from xmag_hf.embedding.exchange import FORMATS, export_bag, find_files, import_bag

EXAMPLE = "xmag bags export bags --to stamp --out stamp_features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("action", choices=("export", "import"))
    parser.add_argument("bags", nargs="+", metavar="BAGS", help=".h5 files, or folders of them")
    parser.add_argument("--to", choices=FORMATS, help="layout to export to")
    parser.add_argument("--from", dest="source", choices=FORMATS, help="layout to import from")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    known = parser.add_argument_group("import", "what the files do not say")
    known.add_argument("--encoder", metavar="NAME", help="that made the features")
    known.add_argument("--encoder-revision", metavar="REV", help="its commit or digest")
    known.add_argument("--pooling", choices=("cls", "mean", "cls+mean"))
    known.add_argument("--mpp", type=float, metavar="F", help="um/px of the patches")
    known.add_argument("--patch-px", type=int, metavar="PX", help="side of a patch, px at --mpp")
    known.add_argument("--mpp0", type=float, metavar="F", help="um/px of the slides' level 0")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Convert; 0 if every file could be, else 1."""
    wanted, unwanted = ("to", "source") if args.action == "export" else ("source", "to")
    if getattr(args, wanted) is None or getattr(args, unwanted) is not None:
        parser.error(f"{args.action} takes {'--to' if wanted == 'to' else '--from'}, not the other")
    try:
        files = find_files(args.bags, args.source or "")
    except BagError as error:
        parser.error(str(error))
    console = Console()
    lost: dict[str, int] = {}
    failed = 0
    for path in files:
        try:
            for name in _convert(path, args):
                lost[name] = lost.get(name, 0) + 1
        except (BagError, PermissionError, FileNotFoundError) as error:
            failed += 1
            console.print(f"failed: {error}", markup=False, soft_wrap=True)
    done = f"{len(files) - failed} of {len(files)} bags in {args.out}"
    console.print(done, markup=False, soft_wrap=True)
    if lost:
        console.print(f"{args.to} cannot hold: {', '.join(lost)}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _convert(path: Path, args: argparse.Namespace) -> list[str]:
    """Convert one file; returns what is lost."""
    if args.action == "export":
        return export_bag(read_bag(path), args.out, args.to, overwrite=args.overwrite)
    names = ("encoder", "encoder_revision", "pooling", "mpp", "patch_px", "mpp0")
    bag = import_bag(path, args.source, **{name: getattr(args, name) for name in names})
    target = args.out / path.name
    if target.exists() and not args.overwrite:
        raise BagError(f"{target} exists. Choose another --out, or say --overwrite.")
    args.out.mkdir(parents=True, exist_ok=True)
    write_bag(target, bag)
    return []
