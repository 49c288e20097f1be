"""Public data sets as they are distributed: the commands of docs/forms.md, and what they find.

Each runs on a made-up copy, a dozen small images with the true names, tree and header (forms.txt).
"""

import re
import shlex
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
from common.cli import Parser
from common.readers import read

DOCS = (ROOT / "docs/forms.md").read_text(encoding="utf-8")


def forms():
    """{name: {kind: [(text, lines below it)]}}, as forms.txt has them."""
    found = {}
    for line in (ROOT / "tests/forms.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            form = found.setdefault(line[1:-1], {})
        elif told := re.match(r"(\w+): (.*)", line):
            form.setdefault(told[1], []).append((told[2], lines := []))
        elif line and not line.startswith("# "):
            lines.append(line)
    return found


def table():
    """{name: (layout, source, what data.py says, command)} of the rows of docs/forms.md."""
    rows = [re.split(r"(?<!\\)\|", x)[1:-1] for x in DOCS.splitlines() if x.startswith("| ")]
    rows = [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]
    return {name: rest for name, *rest in rows if rest[-1].startswith("`") and name != "data set"}


FORMS, TABLE = forms(), table()


def forms_with_marks():
    """The names; those with a todo are expected to fail, until the reader is right."""
    for name, form in FORMS.items():
        todo = [reason for reason, _ in form.get("todo", [])]
        xfail = [pytest.mark.xfail(strict=True, raises=AssertionError, reason=x) for x in todo]
        yield pytest.param(name, marks=xfail)


def told(name, kind):
    """The texts that forms.txt has of a kind, such as image, for a data set."""
    return [text for text, _ in FORMS[name].get(kind, [])]


def in_turn(templates):
    return [templates[i % len(templates)].format(i=i, j=i // 2) for i in range(12) if templates]


def draw(folder, name):
    """A file: an image of 8 x 8 pixels, another for each name, or some text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".bmp"):
        pixels = np.random.default_rng([*name.encode()]).integers(0, 255, (8, 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    else:
        path.write_text("x")


def write_npz(file, shape, columns, classes):
    """A MedMNIST file; shape: of an image; columns: of labels, 0 or 1 where there are several."""
    arrays, rng = {}, np.random.default_rng(0)
    for split, n in (("train", 9), ("val", 1), ("test", 2)):
        labels = np.arange(n)[:, None] % classes
        arrays[f"{split}_images"] = rng.integers(0, 255, (n, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = labels if columns == 1 else rng.integers(0, 2, (n, columns))
    np.savez(file, **arrays)


def make(name, folder):
    """Write the made-up copy of a data set below a folder."""
    for other in told(name, "like"):
        make(other, folder)
    for path in {*in_turn(told(name, "image")), *in_turn(told(name, "beside"))}:
        draw(folder, path)
    for path, (header, *rows) in FORMS[name].get("file", []):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join([header, *in_turn(rows)]).replace("\\n", "\n")
        (folder / path).write_text(text, encoding="utf-8")
    for words in told(name, "npz"):
        file, shape, columns, classes = words.split()
        write_npz(folder / file, [*map(int, shape.split(","))], int(columns), int(classes))


def found(words):
    """What read() finds by the words of a command, in a line as forms.txt has it."""
    parser = Parser("")
    data.add_arguments(parser, "data")
    args = parser.parse_args(words)
    images = read(args.data, **data.options(args))
    parts = [f"{len(images)} images", "|".join(images.classes) or "no labels"]
    parts += ["multi-label"] if images.multilabel else []
    parts += [] if images.groups is None else [f"{len({*images.groups})} groups"]
    given = Counter(images.given.tolist())
    parts += [f"{side} {given[side]}" for side in ("train", "val", "test") if given[side]]
    without = (~images.labelled).sum() if images.classes else 0
    return "; ".join(parts + [f"{without} without a label"] * bool(without))


@pytest.fixture
def says(script, tmp_path, monkeypatch):
    """says(name, words) -> exit status and all that data.py says of the copy, in its folder."""

    def call(name, words):
        (tmp_path / "copy").mkdir()
        monkeypatch.chdir(tmp_path / "copy")
        make(name, tmp_path / "copy")
        status, out, err = script(data, *words, "--img-size", 8)
        assert not status or (status == 2 and err.count("error: ") == 1), out + err
        text = out + err[err.find("error: ") :] if status else out
        return status, text.replace(str(tmp_path), "")

    return call


def words_of(name):
    return shlex.split(told(name, "run")[0] if told(name, "run") else TABLE[name][-1].strip("`"))


def check_quotes(quotes, status, text):
    """Of the path alone, data.py says what docs/forms.md quotes."""
    assert not quotes.startswith("reads it") or not status and "no labels" not in text
    for part in re.split("…|\n", "\n".join(re.findall("`([^`]+)`", quotes))):
        assert part.strip() in text


@pytest.mark.parametrize("name", [*forms_with_marks()])
def test_command(name, says):
    """The command finds what the data set holds, or is refused in one line."""
    words = words_of(name)
    status, text = says(name, words)
    for expected in told(name, "finds"):
        assert (expected == "error") == bool(status), text
        assert status or found(words) == expected
    for pattern in told(name, "says"):
        assert re.search(pattern, text), text
    if name in TABLE and len(words) == 1:
        check_quotes(TABLE[name][2], status, text)


@pytest.mark.parametrize("name", [name for name in TABLE if len(words_of(name)) > 1])
def test_path_alone(name, says):
    check_quotes(TABLE[name][2], *says(name, words_of(name)[:1]))


def test_layouts():
    """Names and headers in the page are those of the copies."""
    for name, (layout, *_) in TABLE.items():
        files = [x for kind in ("image", "beside", "npz") for x in told(name, kind)]
        files += [x for path, lines in FORMS[name].get("file", []) for x in (path, *lines)]
        for part in re.split("…|\n", "\n".join(re.findall("`([^`-][^`]*)`", layout))):
            assert any(part in file for file in files), f"{name}: {part}"


def test_every_form_is_in_the_page():
    assert [name for name in FORMS if not told(name, "run")] == list(TABLE)
    assert all(source for _, source, *_ in TABLE.values())
