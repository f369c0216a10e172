"""Entry of `xmag`: a table of verb to module, imported only when the verb is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from xmag_hf._version import __version__
from xmag_hf.cli.options import hyphenated
from xmag_hf.host_memory import keep_freed_memory

# verb -> (module, one line for `xmag --help`). A module offers EXAMPLE, add_arguments and run.
VERBS = {
    "corpus": ("xmag_hf.cli.corpus", "slides -> paired 20x/5x corpus (Parquet, load_dataset-able)"),
    "cache": ("xmag_hf.cli.cache", "corpus + 20x teacher -> teacher features, kept on disk"),
    "distill": ("xmag_hf.cli.distill", "corpus + 20x teacher -> 5x student folder"),
    "spider": ("xmag_hf.cli.spider", "SPIDER's patches -> 20x/5x data set for probes (Parquet)"),
    "probe": ("xmag_hf.cli.probe", "frozen embeddings -> linear, kNN, few-shot and count probes"),
    "project": ("xmag_hf.cli.project", "t-SNE pictures of embeddings, and confusion matrices"),
    "info": ("xmag_hf.cli.info", "slides -> size, um/px, tissue, patches at 5x and 20x"),
    "embed": ("xmag_hf.cli.embed", "slides -> one HDF5 bag of embeddings each"),
    "mil": ("xmag_hf.cli.mil", "bags + labels -> slide-level heads, five folds by patient"),
    "predict": ("xmag_hf.cli.predict", "bags or slides + head -> class probabilities, CSV"),
    "bench": ("xmag_hf.cli.bench", "slides per minute here, by stage, beside the paper's encoders"),
    "bags": ("xmag_hf.cli.bags", "bags <-> TRIDENT, CLAM, STAMP"),
    "e2e": ("xmag_hf.cli.e2e", "slides + labels + encoder -> encoder and head trained together"),
    "heatmap": ("xmag_hf.cli.heatmap", "head + bags -> attention as picture and QuPath GeoJSON"),
    "compare": ("xmag_hf.cli.compare", "studies on the same slides -> paired tests, intervals"),
    "convert": ("xmag_hf.cli.convert", "DINOv2 or XMAG weights -> XMAG folder"),
}
STARTS_ANEW = ("project", "info", "predict", "bench", "compare")  # keep nothing to go on from


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are what is wrong, without the usage of thirty options before it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; default `sys.argv[1:]`.

    Returns:
        0 all done, 1 something failed, 2 wrong usage (argparse exits with it itself).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in VERBS:
        return _top_level(argv)
    return run_verb(argv[0], argv[1:])


def run_verb(verb: str, argv: Sequence[str], prog: str | None = None) -> int:
    """Parse `argv` for `verb`, run it, and turn expected errors into one clear line.

    Args:
        verb: A key of `VERBS`.
        argv: The verb's own arguments.
        prog: Program name shown by `--help`; default `xmag VERB`.

    Returns:
        The exit code: 0 done, 1 failed.
    """
    keep_freed_memory()
    _settle_environment()
    module = importlib.import_module(VERBS[verb][0])
    prog = prog or f"xmag {verb}"
    parser = Parser(
        prog=prog,
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars, only results")
    args = parser.parse_args(hyphenated(argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("xmag_hf").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        return module.run(args, parser)
    except KeyboardInterrupt:
        resumed = "" if verb in STARTS_ANEW else "; run the same command again to resume"
        print(f"{prog}: interrupted{resumed}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        # Ours carry subject, value and remedy. Anything else is a bug and keeps its traceback.
        ours = type(error).__module__.startswith("xmag_hf") or not isinstance(error, ValueError)
        if os.environ.get("XMAG_DEBUG") or not ours:
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return 1


def _settle_environment() -> None:
    """What libraries read when the verb's module loads them; what the user has set wins."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Slides are read beside the encoder, so threads outnumber cores: one that waits spins a
        # thirtieth of libgomp's default on a core that another needs.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Without a network it tells of every retry, twice; the error at the end says what was missing.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _top_level(argv: list[str]) -> int:
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in VERBS.items())
    parser = Parser(
        prog="xmag",
        description="Distil a 20x pathology encoder into a 5x student, and use it.",
        epilog=f"verbs (each has --help with an example):\n{verbs}\n\n"
        "XMAG_DEBUG=1 shows the traceback behind an error message.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xmag_hf {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    if not argv:
        parser.print_help()
        return 2
    parser.parse_args(argv[:1])
    return 0
