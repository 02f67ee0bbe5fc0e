"""Bad input: one clear line and exit code 2, for every command of the project."""

import errno
import sys
import warnings
from collections.abc import Callable

from utils.run.signals import Stopped

# Of which a user can change nothing. On a GPU: that float32 products could be TF32's, and that the thread of a backward
# pass begins without a context. Of timm where it resamples positions: how it indexes, and searches.
_IDLE_WARNINGS = (
    "TensorFloat32 tensor cores for float32 matrix multiplication available",
    "Attempting to run cuBLAS",
    "Using a non-tuple sequence for multidimensional indexing",
    r"torch.searchsorted\(\): input value tensor is non-contiguous",
)


class InputError(ValueError):
    """What a user gave cannot be used; the message says in one line what was expected and what came."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # what came may have lines of its own


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run `main`, and end with one line where it does not end well.

    Warnings that mean nothing to a user are not shown.
    Exit codes: 2 for bad input, NaN in a model or a full disk; 130 for Ctrl-C and 143 for SIGTERM.
    """
    for message in _IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message)
    try:
        main()
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
