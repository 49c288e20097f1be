"""Plants each fault of this folder in a copy of the code and names the test that fails.

    python tests/faults/check.py [NAME.patch ...]

A patch begins with a line of what is wrong and a line with the test that must notice it. Exit
status 1 where a patch does not apply or its test still passes.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CODE = ("*.py", "*.md", "*.toml", "common", "tools", "tests", "docs", "results")


def copy(place):
    for path in (path for pattern in CODE for path in ROOT.glob(pattern)):
        take = shutil.copytree if path.is_dir() else shutil.copy
        take(path, place / path.name)


def verdict(patch, place):
    """What the named test says of the patched copy; None where it fails, as it should."""
    test = patch.read_text().splitlines()[1].removeprefix("caught by: ")
    words = ["patch", "-p1", "--fuzz=0", "--batch", "-i", patch.resolve()]
    applied = subprocess.run(words, cwd=place, capture_output=True, text=True)
    if applied.returncode:
        return f"does not apply: {applied.stdout.strip()}"
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", test]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    return None if done.returncode == 1 else f"status {done.returncode}: {done.stdout[-300:]}"


def main():
    patches = [HERE / Path(name).name for name in sys.argv[1:]] or sorted(HERE.glob("*.patch"))
    missed = 0
    for patch in patches:
        with tempfile.TemporaryDirectory() as place:
            copy(Path(place))
            said = verdict(patch, Path(place))
        what, test = patch.read_text().splitlines()[:2]
        print(f"{'ok    ' if said is None else 'MISSED'} {patch.name}: {what} ({test})", flush=True)
        if said is not None:
            print(f"       {said}")
            missed += 1
    print(f"{len(patches) - missed} of {len(patches)} faults are noticed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
