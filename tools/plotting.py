"""Pictures of numbers and words with Pillow, laid beside and above each other: none overlap."""

import functools
import re
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# values: from dark to light, so that lightness alone tells them apart
SCALE = np.array([(27, 16, 68), (58, 74, 140), (42, 138, 140), (108, 192, 106), (251, 230, 77)])
UNKNOWN = (225, 225, 225)
COLOURS = {"train": "#0072b2", "val": "#d55e00", "cnn": "#56b4e9", "vit": "#e69f00", "": "black"}
MORE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]  # Okabe and Ito's
GAP, LETTER, SMALL = 14, 15, 12  # pixels
font = functools.lru_cache(ImageFont.load_default)
blank = functools.partial(Image.new, "RGB", color="white")


def width_of(string, size=LETTER):
    return int(np.ceil(font(size).getlength(string.rstrip())))


def plain(string):
    """Without accents, and ? for other scripts: Pillow's own font has plain Latin letters alone."""
    letters = (c for c in unicodedata.normalize("NFKD", string) if not unicodedata.combining(c))
    return "".join(c if c.isascii() else "?" for c in letters)


def text(string, width=2000, size=LETTER):
    """A picture of the text, broken into lines where it would be wider than `width` pixels."""
    lines = []
    for paragraph in plain(string).split("\n"):
        lines.append("")
        for word in re.findall(r"\S+\s*", paragraph):
            if lines[-1] and width_of(lines[-1] + word, size) > width:
                lines.append("")
            for piece in [word] if width_of(word, size) <= width else word:
                if width_of(lines[-1] + piece, size) > width:  # a long name is cut anywhere
                    lines.append("")
                lines[-1] += piece
    step = round(size * 1.35)
    image = blank((1 + max(width_of(line, size) for line in lines), step * len(lines)))
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, i * step), line, "black", font(size))
    return image


def beside(*images, gap=GAP):
    """A row of pictures on one base line."""
    row, x = blank((sum(i.width + gap for i in images) - gap, max(i.height for i in images))), 0
    for image in images:
        row.paste(image, (x, row.height - image.height))
        x += image.width + gap
    return row


def above(*images, gap=GAP // 2):
    """A column of pictures, flush left: a row that is turned, as are the pictures in it."""
    row = beside(*(image.transpose(Image.Transpose.ROTATE_90) for image in images), gap=gap)
    return row.transpose(Image.Transpose.ROTATE_270)


def share(values, low, high):
    """Where numbers lie between low (0) and high (1); in the middle where these are the same."""
    return (values - low) / (high - low) if high > low else values * 0 + 0.5


def colours(values, low, high):
    """Numbers of any shape -> (..., 3) uint8 of SCALE; UNKNOWN for nan."""
    values = np.asarray(values, np.float64)
    at = share(values, low, high) * (len(SCALE) - 1)
    rgb = np.stack([np.interp(at, range(len(SCALE)), channel) for channel in SCALE.T], -1)
    return np.where(np.isnan(values)[..., None], UNKNOWN, rgb.round()).astype(np.uint8)


def ticks(low, high):
    """Low, middle and high, with as many digits as tell them apart: a list of (number, text)."""
    values = np.linspace(low, high, 3 if high > low else 1).tolist()
    enough = (d for d in range(3, 17) if len({f"{v:.{d}g}" for v in values}) == len(values))
    digits = next(enough, 17)
    return [(value, f"{value:.{digits}g}") for value in values]


def colour_bar(low, high, height, label):
    """The colours from low to high, these numbers, and what they are."""
    marks = ticks(low, high)
    bar = blank((26 + max(width_of(mark) for _, mark in marks), height))
    ramp = colours(np.linspace(high, low, height), low, high)
    bar.paste(Image.fromarray(np.repeat(ramp[:, None], 18, axis=1)))
    for value, mark in marks:
        y = np.clip((1 - share(value, low, high)) * height, LETTER / 2, height - LETTER / 2)
        ImageDraw.Draw(bar).text((24, y), mark, "black", font(LETTER), "lm")
    return beside(bar, text(label, height).rotate(90, expand=True), gap=4)


def matrix(values, rows, columns, labels, low, high):
    """Numbers (R, C) as labelled cells, R and C names -> the picture, the height of its cells."""
    cell = max(34, 10 + max(width_of(label, SMALL) for row in labels for label in row))
    rgb = colours(values, low, high)
    cells = Image.fromarray(np.kron(rgb, np.ones((cell, cell, 1), np.uint8)))
    for r, c in np.ndindex(*values.shape):
        ink = "white" if rgb[r, c] @ (0.299, 0.587, 0.114) < 130 else "black"
        at = ((c + 0.5) * cell, (r + 0.5) * cell)
        ImageDraw.Draw(cells).text(at, labels[r][c], ink, font(SMALL), "mm")
    heads, names = ([text(name, size=SMALL) for name in side] for side in (columns, rows))
    if max(head.width for head in heads) > cell - 4:
        heads = [head.rotate(90, expand=True) for head in heads]
    left, top = max(name.width for name in names) + 6, max(head.height for head in heads) + 6
    table = blank((left + cells.width, top + cells.height))
    table.paste(cells, (left, top))
    for i, name in enumerate(names):
        table.paste(name, (left - 6 - name.width, top + int((i + 0.5) * cell - name.height / 2)))
    for i, head in enumerate(heads):
        table.paste(head, (left + int((i + 0.5) * cell - head.width / 2), top - 6 - head.height))
    return table, cells.height


def plot(title, lines, palette=COLOURS, width=300, height=150, edge=8):
    """Lines {name in palette: [(x, y), ...]} over axes from the least to the greatest number."""
    points = np.array([point for line in lines.values() for point in line], float)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()

    def place(x, y):
        up = share(y, y0, y1) * (height - 2 * edge)
        return edge + share(x, x0, x1) * (width - 2 * edge), height - edge - up

    area = blank((4 * width, 4 * height))  # reduced below, which smooths the lines
    draw = ImageDraw.Draw(area)
    draw.line([(2, 0), (2, 4 * height - 3), (4 * width, 4 * height - 3)], "gray", 4)
    for name, line in lines.items():
        at = [tuple(4 * v for v in place(*point)) for point in line]
        draw.line(at, palette[name], 8, "curve")
        for x, y in at if len(at) <= 50 else ():
            draw.ellipse((x - 11, y - 11, x + 11, y + 11), palette[name])
    marks = ticks(y0, y1)
    left = 8 + max(width_of(mark, SMALL) for _, mark in marks)
    axes = blank((left + width + 12, height + 22))
    axes.paste(area.resize((width, height), Image.Resampling.LANCZOS), (left, 0))
    draw = ImageDraw.Draw(axes)
    for y, mark in marks:
        draw.text((left - 5, place(x0, y)[1]), mark, "black", font(SMALL), "rm")
    for x in {x0, (x0 + x1) // 2, x1}:
        draw.text((left + place(x, y0)[0], height + 5), f"{x:g}", "black", font(SMALL), "mt")
    return above(beside(text(title), *(legend(lines, palette) if palette is COLOURS else ())), axes)


def legend(names, palette):
    """A coloured square and the name of each line."""
    return [beside(blank((14, 14), color=palette[n]), text(n), gap=4) for n in names if n]
