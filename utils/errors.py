"""Bad input: one clear line and exit code 2, for every command of the project."""

import errno
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What a user gave cannot be used; the message says in one line what was expected and what came."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run `main`; bad input, NaN in a model or a full disk ends it with one line and exit code 2, Ctrl-C with 130."""
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
