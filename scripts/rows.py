"""Result rows: one run of test_quant.py, one line of a CSV file. Used by scripts/sweep.sh and scripts/tables.py.

python scripts/rows.py has  ROWS MODEL W_BIT A_BIT RECIPE MODE SEED OPTIONS    exit code 0 if the run is there, and did
                                                                               not fail; 1 if not; 2 if ROWS won't do
python scripts/rows.py add  ROWS results.json OPTIONS
python scripts/rows.py fail ROWS MODEL W_BIT A_BIT RECIPE MODE SEED OPTIONS REASON

OPTIONS are all others that the run was given, in one argument.
"""

import csv
import fcntl
import io
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import check_writable

RUN = ("model", "w_bit", "a_bit", "recipe", "mode", "seed")
KEY = (*RUN, "options")
VALUES = ("tag", "n", "top1", "top5", "float_top1", "float_top5")
ORIGIN = ("precision", "calibration_images", "device", "commit", "date")
STAGES = ("build", "images", "calibrate", "evaluate")
COLUMNS = (*KEY, *VALUES, *(f"{stage}_s" for stage in STAGES), "steps", "precision", "calibration_images")
COLUMNS = (*COLUMNS, "device", "torch", "timm", "commit", "date", "error")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it is absent; of a run that was repeated after a failure, the last."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable file of rows ({error})") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values() or not {*KEY, *VALUES, "error"} <= row.keys():
            raise InputError(f"{path}: row {number} does not have the columns {', '.join(COLUMNS)}")
    return list({tuple(row[key] for key in KEY): row for row in rows}.values())


def check_rows(path: Path, columns: tuple[str, ...] = COLUMNS) -> None:
    """Refuse a file to which rows cannot be appended, before they are measured: its folder is made, if need be."""
    check_writable(path.parent)
    try:
        with path.open("r+", newline="", encoding="utf-8") as file:
            found = file.readline().strip()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a file of rows that can be written ({error})") from error
    if found != ",".join(columns):
        raise InputError(f"{path}: expected the columns {','.join(columns)}; got {found[:80] or 'none'}")


def append_row(path: Path, row: dict, columns: tuple[str, ...] = COLUMNS) -> None:
    """Append one row, also while other runs append theirs; the first is preceded by the names of the columns.

    Where there is a column for it, a row without a date gets that of now.
    """
    if "date" in columns:
        row = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")} | row
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        size = file.tell()
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        if size == 0:
            writer.writeheader()
        writer.writerow(row)
        try:
            os.write(file.fileno(), text.getvalue().encode())  # at once: whole, or not there
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), size)
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def row_of(results: dict, options: str) -> dict:
    """The row of a run's results.json."""
    row = {name: results[name] for name in (*RUN, *VALUES, *ORIGIN)} | {"options": options}
    row |= {f"{stage}_s": round(results["seconds"][stage], 2) for stage in STAGES}
    row |= {name: results["versions"][name] for name in ("torch", "timm")}
    return row | {"steps": results["options"]["steps"]}


def main() -> None:
    match sys.argv[1:]:
        case ["add", path, results, options]:
            try:
                row = row_of(json.loads(Path(results).read_text()), options)
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise InputError(f"{results}: expected the results.json of a run ({error!r})") from error
            append_row(Path(path), row)
        case ["fail", path, *values] if len(values) == len(KEY) + 1:
            append_row(Path(path), dict(zip((*KEY, "error"), values, strict=True)))
        case ["has", path, *key] if len(key) == len(KEY):
            check_rows(Path(path))
            done = {tuple(row[key] for key in KEY) for row in read_rows(Path(path)) if not row["error"]}
            sys.exit(0 if tuple(key) in done else 1)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    exit_cleanly(main)
