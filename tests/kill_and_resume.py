"""Kill a run with SIGKILL again and again, resume it each time, and compare it with an uncut one.

    python tests/kill_and_resume.py --kills 20 --data /path [more flags of pretrain.py]
    python tests/kill_and_resume.py --kills 5 --script finetune.py --ckpt cnn.pt [more flags]

The kills come at random moments of the run's work, the first steps, checkpoints and last writes
included. Exit status 0 if the weights are equal to the last bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SMALL = (
    "--cnn test_resnet --vit test_vit --img-size 32 --init random --epochs 3 --bs 8 --t-max 8 "
    "--swa-start 0.3"
).split()
WEIGHTS = {"pretrain.py": ("cnn.pt", "vit.pt"), "finetune.py": ("best.pt",)}


def command(script, out, arguments):
    return [sys.executable, str(ROOT / script), *arguments, "--out", str(out)]


def kill_and_resume(script, kills, arguments, folder, seed=0):
    """Returns how often the run was cut before its end. Raises AssertionError on other weights."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}

    def start(name, *more):
        """The process, once it has written a checkpoint or ended."""
        last = folder / name / "last.pt"
        before = last.exists() and last.stat().st_mtime_ns
        process = subprocess.Popen(command(script, folder / name, [*arguments, *more]), **quiet)
        while process.poll() is None and before == (last.exists() and last.stat().st_mtime_ns):
            time.sleep(0.002)
        return process

    began = time.perf_counter()
    process, at_work = start("uncut"), time.perf_counter()
    error = process.communicate()[1]
    assert process.returncode == 0, error
    starting, working = at_work - began, time.perf_counter() - at_work
    rng, cut = random.Random(seed), 0
    for kill in range(kills):
        if kill % 4 < 3:  # at work, and so that the run outlives the kills
            process = start("cut", "--resume")
            time.sleep(rng.uniform(0, 1.5 * working / kills) if kill else 0)
        else:  # before, or with the first steps
            process = subprocess.Popen(
                command(script, folder / "cut", [*arguments, "--resume"]), **quiet
            )
            time.sleep(rng.uniform(0, 1.2 * starting))
        process.kill()
        error = process.communicate()[1]
        assert process.returncode in (0, -9), error
        cut += process.returncode == -9
        print(f"kill {kill + 1} of {kills}: {cut} of them before the end", flush=True)
    end = subprocess.run(command(script, folder / "cut", [*arguments, "--resume"]), **quiet)
    assert end.returncode == 0, end.stderr
    for name in WEIGHTS[script]:
        uncut, resumed = (
            torch.load(folder / f / name, weights_only=True)["state_dict"] for f in ("uncut", "cut")
        )
        assert uncut.keys() == resumed.keys()
        different = [key for key in uncut if not torch.equal(uncut[key], resumed[key])]
        assert not different, f"{name}: {different[:3]} differ"
    logs = [(folder / f / "log.jsonl").read_text().splitlines() for f in ("uncut", "cut")]
    assert len(logs[0]) == len(logs[1])
    return cut


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--script", default="pretrain.py", choices=list(WEIGHTS))
    args, more = parser.parse_known_args()
    if args.script == "pretrain.py":
        more = [*SMALL, "--save-every", "5", *more]
    else:
        more = ["--save-every", "2", *more]
    with tempfile.TemporaryDirectory() as scratch:
        n = kill_and_resume(args.script, args.kills, more, Path(scratch))
    print(f"equal to the last bit after {args.kills} kills, {n} of them before the end")
