"""Convert bags to and from the layouts of TRIDENT, CLAM and STAMP."""

from __future__ import annotations

import argparse
from pathlib import Path

from xmag_hf.data_builders import CorpusError
from xmag_hf.data_builders.slide_list import read_mpp
from xmag_hf.embedding.bag import IDENTITY, BagError, read_bag, write_bag
from xmag_hf.embedding.exchange import FORMATS, export_bag, find_files, import_bag, stamp_extractor

# What gives a missing value best: um/px of patches follows from that of level 0, where a file says
# how wide they are.
FLAGS = {"mpp": "--mpp0 or --slides-csv, else --mpp"}
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
    known.add_argument(
        "--encoder",
        metavar="NAME",
        help="that made the features, as `xmag embed` calls it; wins over STAMP's own name for it",
    )
    known.add_argument(
        "--encoder-revision",
        metavar="REV",
        help="digest of its weights: sha256: and 16 hex digits, as in bags of `xmag embed`",
    )
    known.add_argument("--pooling", choices=("cls", "mean", "cls+mean"))
    known.add_argument("--mpp", type=float, metavar="F", help="um/px of the patches")
    known.add_argument("--patch-px", type=int, metavar="PX", help="side of a patch, px at --mpp")
    known.add_argument("--mpp0", type=float, metavar="F", help="um/px of the slides' level 0")
    known.add_argument(
        "--slides-csv",
        type=Path,
        metavar="F",
        help="columns slide_id, mpp: um/px of level 0 slide by slide, where they differ",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Convert; 0 if every file could be, else 1."""
    wanted, unwanted = ("to", "source") if args.action == "export" else ("source", "to")
    if getattr(args, wanted) is None or getattr(args, unwanted) is not None:
        parser.error(f"{args.action} takes {'--to' if wanted == 'to' else '--from'}, not the other")
    if args.slides_csv and (args.mpp0 is not None or args.action == "export"):
        parser.error("--slides-csv is for import, in place of --mpp0")
    try:
        files = find_files(args.bags, args.source or "")
        mpp0 = None if args.slides_csv is None else read_mpp(args.slides_csv)
        _refuse_collisions(files, args)
    except (BagError, CorpusError) as error:
        parser.error(str(error))
    missing: dict[str, None] = {}  # sets in the order of what was found first
    extractors: dict[str, None] = {}
    failed = 0
    for path in files:
        try:
            told = _export(path, args) if args.to else _import(path, args, mpp0)
            missing |= dict.fromkeys(told)
            if args.source == "stamp" and (extractor := stamp_extractor(path)):
                extractors[extractor] = None
        except (BagError, PermissionError, FileNotFoundError) as error:
            failed += 1
            print(f"failed: {error}")
    done = len(files) - failed
    print(f"{done} of {len(files)} bags in {args.out}")
    if missing and args.action == "export":
        print(f"{args.to} cannot hold: {', '.join(missing)}")
    elif missing:
        flags = ", ".join(FLAGS.get(name, f"--{name.replace('_', '-')}") for name in missing)
        print(f"not known: {', '.join(missing)}; heads compare them. If you know them: {flags}")
    names = ", ".join(map(repr, extractors))
    if names and args.encoder is None:
        print(f"encoder: {names}, as STAMP calls it; heads that know it by another need --encoder")
    elif extractors.keys() - {args.encoder}:
        print(f"encoder: {args.encoder}, as given; STAMP calls it {names}")
    if args.mpp0 is not None and done > 1:
        print(f"{args.mpp0:g} um/px was taken for all {done} slides; if not: --slides-csv")
    return 1 if failed else 0


def _target(path: Path, args: argparse.Namespace) -> Path:
    """The bag, or the layout's HDF5 file, that is made of a file: named after the slide."""
    folder = args.out / "h5_files" if args.to == "clam" else args.out
    return folder / f"{path.stem}.h5"


def _refuse_collisions(files: list[Path], args: argparse.Namespace) -> None:
    """Refuse two files for one slide, and an output in an input's place.

    Raises:
        BagError: Names both files.
    """
    inputs = {path.resolve() for path in files}
    seen: dict[str, Path] = {}
    for path in files:
        if path.stem in seen:
            raise BagError(
                f"{seen[path.stem]} and {path} are of one slide, and only one can be in {args.out}."
                " Name one of them, or rename it."
            )
        seen[path.stem] = path
        target = _target(path, args)
        if target.resolve() in inputs:
            raise BagError(f"{target} would be replaced, and is to be read. Choose another --out.")


def _export(path: Path, args: argparse.Namespace) -> list[str]:
    """Convert one bag; returns what is lost."""
    return export_bag(read_bag(path), args.out, args.to, overwrite=args.overwrite)


def _import(path: Path, args: argparse.Namespace, mpp0: dict[str, float] | None) -> list[str]:
    """Convert one foreign file; returns what heads compare and is still not known."""
    known = {name: getattr(args, name) for name in (*IDENTITY, "mpp0")}
    if mpp0 is not None:
        if path.stem not in mpp0:
            raise BagError(f"{path}: {args.slides_csv} has no mpp for {path.stem}. Add it.")
        known["mpp0"] = mpp0[path.stem]
    bag = import_bag(path, args.source, **known)
    target = _target(path, args)
    if target.exists() and not args.overwrite:
        raise BagError(f"{target} exists. Choose another --out, or say --overwrite.")
    args.out.mkdir(parents=True, exist_ok=True)
    write_bag(target, bag)
    return [name for name in IDENTITY if getattr(bag.info, name) is None]
