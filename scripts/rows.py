"""Result rows: one run of test_quant.py, one line of a CSV file. Used by scripts/sweep.sh and scripts/tables.py.

python scripts/rows.py has  ROWS MODEL W_BIT A_BIT MODE SEED    exit code 0 if the run is there, and did not fail
python scripts/rows.py add  ROWS results.json
python scripts/rows.py fail ROWS MODEL W_BIT A_BIT MODE SEED REASON
"""

import csv
import fcntl
import json
import os
import sys
from pathlib import Path

KEY = ("model", "w_bit", "a_bit", "mode", "seed")
VALUES = ("tag", "n", "top1", "top5", "float_top1", "float_top5")
STAGES = ("build", "images", "calibrate", "evaluate")
COLUMNS = (*KEY, *VALUES, *(f"{stage}_s" for stage in STAGES), "steps", "calibration_images")
COLUMNS = (*COLUMNS, "device", "torch", "timm", "commit", "date", "error")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it is absent; of a run that was repeated after a failure, the last."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list({tuple(row[key] for key in KEY): row for row in csv.DictReader(file)}.values())


def append_row(path: Path, row: dict) -> None:
    """Append one row, also while other runs append theirs; the first is preceded by the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def row_of(results: dict) -> dict:
    """The row of a run's results.json."""
    row = {name: results[name] for name in (*KEY, *VALUES, "calibration_images", "device", "commit", "date")}
    row |= {f"{stage}_s": round(results["seconds"][stage], 2) for stage in STAGES}
    row |= {name: results["versions"][name] for name in ("torch", "timm")}
    return row | {"steps": results["options"]["steps"]}


def main() -> None:
    command, path, *rest = sys.argv[1:]
    if command == "add":
        append_row(Path(path), row_of(json.loads(Path(rest[0]).read_text())))
    elif command == "fail":
        append_row(Path(path), dict(zip((*KEY, "error"), rest, strict=True)))
    elif command == "has":
        done = {tuple(row[key] for key in KEY) for row in read_rows(Path(path)) if not row["error"]}
        sys.exit(0 if tuple(rest) in done else 1)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
