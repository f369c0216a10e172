"""Distil a 5x student from a 20x teacher: `accelerate launch train_distill.py --help`.

The same program as `xmag distill`, for one CPU, one GPU, many GPUs or many nodes:

    accelerate launch train_distill.py --data corpus --teacher uni2-h --student base \
        --cache_teacher --output_dir xmag
"""

import sys

from xmag_hf.cli.main import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("distill", sys.argv[1:], prog="train_distill.py"))
