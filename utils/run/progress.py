"""Progress bars: live in a terminal, a line every half minute in a log file."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from utils.run.distributed import is_first


def progress_bar(iterable: Iterable | None = None, **options: object) -> tqdm:
    """tqdm, which redraws ten times a second in a terminal and seldom where each redraw is a line of a log."""
    options["disable"] = options.get("disable", False) or not is_first()
    seldom = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}  # by itself tqdm waits 10 s at most
    return tqdm(iterable, dynamic_ncols=True, **seldom, **options)


def note(message: str) -> None:
    """Print a line to stderr, above the bars."""
    tqdm.write(message, file=sys.stderr)
