"""Calibration before and after the temperature, of finished runs of finetune.py, as a CSV file.

    python tests/calibrate_probabilities.py RUN [RUN ...] --out results/calibration

RUN holds metrics.json. Writes calibration.csv: a row for each run, with the expected calibration
error and the Brier score of the test images, of the sigmoids as trained ("uncalibrated") and of the
calibrated distribution, and their 95 % intervals where there are enough images.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.checkpoint import read_json, write_csv  # noqa: E402

KEYS = ("ece_uncalibrated", "ece", "brier_uncalibrated", "brier")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with metrics.json")
    parser.add_argument("--out", default="results/calibration", help="folder of calibration.csv")
    args = parser.parse_args()
    header, rows = ["run", "arm", "n_val", "n_test", "temperature", "accuracy"], []
    header += [f"{key}{end}" for key in KEYS for end in ("", "_low", "_high")]
    for run in args.runs:
        found = read_json(run / "metrics.json")
        test = found["test"]
        right = test.get("accuracy", test.get("exact_match"))
        name = "/".join(run.resolve().parts[-3:])
        row = [name, found["arm"], found["n_val"], found["n_test"], found.get("temperature", "")]
        for key in KEYS:
            limits = test["ci95"][key] or ("", "")
            row += [test[key], *limits]
        rows.append([*row[:5], right, *row[5:]])
    rows = [[f"{x:.4f}" if isinstance(x, float) else x for x in row] for row in rows]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write_csv(Path(args.out, "calibration.csv"), header, rows)


if __name__ == "__main__":
    main()
