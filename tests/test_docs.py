"""README, docs/ and CONTRIBUTING: every figure follows from results/, links and flags exist.

figures() yields a page, a text with {} for each figure, and the figures recomputed. A number with
a decimal point, a sign or a unit that no entry covers fails too, unless SETTINGS names it.
"""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

import pytest
from conftest import rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
T = 4.303  # 97.5 % quantile of Student's t with 2 degrees of freedom: n = 3
VICREG = "CASS, vicreg"
COLUMNS = [(folder, frac) for folder in ("brain_mri", "ham10000") for frac in ("0.01", "0.1")]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def load(path):
    return json.loads((RESULTS / path).read_text())


@functools.cache
def health(name):
    lines = (RESULTS / f"objectives/health/{name}/log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def signed(x, digits=3):
    return f"{x:+.{digits}f}".replace("-", "−")


# scores of the cells, not of table.json, so that a table that was not updated is noticed


@functools.cache
def score(folder, row, arm, frac, seed):
    metric = "balanced_accuracy" if folder.endswith(("ham10000", "table5")) else "macro_f1"
    name = f"{row.replace(', ', '_')}_{arm}_{frac}_seed{seed}"
    return load(f"{folder}/cells/{name}.json")["metrics"]["test"][metric]


def seeds(folder, row, arm, frac):
    return [score(folder, row, arm, frac, seed) for seed in range(3)]


def both_arms(folder, row, frac):
    """The mean score of both arms, of each seed."""
    return [mean(pair) for pair in zip(*(seeds(folder, row, a, frac) for a in ("cnn", "vit")))]


def difference(folder, row, other, frac):
    """Paired by seed: mean, lower and upper end of its 95 % interval."""
    pairs = zip(both_arms(folder, row, frac), both_arms(folder, other, frac))
    d = [a - b for a, b in pairs]
    half = T * stdev(d) / len(d) ** 0.5
    return mean(d), mean(d) - half, mean(d) + half


def interval(*what):
    d, low, high = map(signed, difference(*what))
    return f"{d} ({low} to {high})"


def bold_interval(*what):
    _, low, high = difference(*what)
    return f"**{interval(*what)}**" if low > 0 or high < 0 else interval(*what)


def mean_minus_better(folder):
    """The averaged probabilities' score minus the better arm's, of every method and fraction."""
    rows = ("DINO", "CASS", "Supervised", VICREG)
    for row in rows:
        for frac in ("0.01", "0.1"):
            arms = [mean(seeds(folder, row, arm, frac)) for arm in ("cnn", "vit", "mean")]
            yield arms[2] - max(arms[:2])


def paper_gain(tables, frac):
    """G.0.3: CASS minus DINO, summed over both arms, mean over data sets, in points."""
    paper = json.loads(page("tools/paper.json"))["tables"]
    gains = []
    for table in tables:
        cells = {k: float(v.split("±")[0]) for k, v in paper[table]["cells"].items()}
        if f"CASS|cnn|{frac}" in cells:
            gains.append(
                sum(
                    cells[f"CASS|{arm}|{frac}"] - cells[f"DINO|{arm}|{frac}"]
                    for arm in ("cnn", "vit")
                )
            )
    return 100 * mean(gains)


def paper_spreads():
    """Every figure behind a ± in the paper's Tables 2 to 5."""
    paper = json.loads(page("tools/paper.json"))["tables"]
    return [cell.split("±")[1].strip() for t in "2345" for cell in paper[t]["cells"].values()]


def our_gain(table, frac):
    return 100 * sum(
        mean(seeds(table, "CASS", arm, frac)) - mean(seeds(table, "DINO", arm, frac))
        for arm in ("cnn", "vit")
    )


def paper_time_ratio():
    times = json.loads(page("tools/paper.json"))["tables"]["1"]["times"]["Brain MRI"]

    def minutes(text):
        hours = re.search(r"(\d+) hour", text, re.I)
        return 60 * int(hours[1] if hours else 0) + int(re.search(r"(\d+) min", text, re.I)[1])

    return minutes(times["CASS"]) / minutes(times["DINO"])


def table_1(row):
    return load(f"table1/cells/{row}_both_0_seed0.json")["pretrain_seconds"]


# the benchmark


def step(name):
    return load(f"benchmark/step_{name}.json")["figures"]


def images_per_second(name, loop="ours"):
    return 16 / median(r["seconds"] for r in step(name)["rounds"][loop])


def gigabytes(name, loop):
    return median(r["peak_gb"] for r in step(name)["rounds"][loop])


def round_ratios(name, other, loop):
    """Speed of `loop` over that of `other`, in each round."""
    rounds = step(name)["rounds"]
    return [a["seconds"] / b["seconds"] for a, b in zip(rounds[other], rounds[loop])]


def step_row(name):
    return (
        images_per_second(name, "notebook"),
        gigabytes(name, "notebook"),
        images_per_second(name),
        gigabytes(name, "ours"),
        median(round_ratios(name, "notebook", "ours")),
        100 * step(name)["share_of_peak"]["ours"],
    )


def loader_row(data):
    for figure in load("benchmark/data.json")["figures"]:
        if figure["data"] == data:
            pairs = zip(figure["ours"], figure["from_disk"])
            yield from (
                median(figure["from_disk"]),
                median(figure["ours"]),
                median(ours / disk for ours, disk in pairs),
            )


def checkpoint_seconds():
    return median(r["checkpoint_seconds"] for r in step("small")["rounds"]["ours"])


def minutes(images, epochs):
    """Of pre-training on the training split of so many images with the recipes' arms."""
    return 0.7 * images * epochs / images_per_second("small") / 60


def health_row(name, epoch):
    row = health(name)[epoch - 1]
    return (
        row["loss"],
        row["cnn_logits_spread"],
        row["vit_logits_spread"],
        row["agreement"],
        100 * row["retrieval"],
    )


def figures():
    """(page, text, values) of every figure."""
    README, COLLAPSE, EXPERIMENTS = "README.md", "docs/collapse.md", "docs/experiments.md"
    SPEED, DIFFERENCES = "docs/speed.md", "docs/differences.md"

    # README
    first = health("equation_1")[0]
    yield (
        README,
        "normalized logits is {:.3f} and {:.3f} on a scale",
        (first["cnn_logits_spread"], first["vit_logits_spread"]),
    )
    warm = {
        frac: tuple(
            map(signed, difference("objectives/brain_mri_warm", "CASS", "Supervised", frac))
        )
        for frac in ("0.01", "0.1")
    }
    yield (
        README,
        "is {} at 1 % of the labels (95 % interval {} to {}) and {} at 10 % ({} to {})",
        warm["0.01"] + warm["0.1"],
    )
    yield README, "the {:.0f} images/s [measured]", (images_per_second("small"),)

    # scores
    scene, but = "patients in 5 folds, 2 classes", ("auroc", "ece")
    folds = {n: [] for n in (7, 20, 100)}
    for row in rows(ROOT / "results/intervals/coverage.csv"):
        if row["scene"] == scene and int(row["units"]) in folds and row["score"] not in but:
            folds[int(row["units"])].append(100 * float(row["coverage"]))
    yield (
        "docs/scores.md",
        "in {:.0f} to {:.0f} % of simulated sets, so that none is given; with 20 in {:.0f} to "
        "{:.0f} %, with 100 in {:.0f} to {:.0f} %",
        [f(folds[n]) for n in (7, 20, 100) for f in (min, max)],
    )
    yield README, "# A laptop, 5,000 images: {:.0f} min", (minutes(5000, 20),)
    yield README, "# 500 images, the same laptop: {:.0f} min", (minutes(500, 100),)

    # collapse: the log
    for text, name, epoch in (
        (
            "equation 1, after epoch 1 | {:.3f} | {:.3f} / {:.3f} | {:.2f} | {:.0f} %",
            "equation_1",
            1,
        ),
        (
            "equation 1, after epoch 8 | {:.5f} | {:.3f} / {:.3f} | {:.2f} | {:.0f} %",
            "equation_1",
            8,
        ),
        (
            "`--lr 3e-4`, after epoch 2 | {:.4f} | {:.3f} / {:.3f} | {:.2f} | {:.0f} %",
            "equation_1_lr_3e-4",
            2,
        ),
        (
            "vicreg --lr 3e-4`, after epoch 1 | {:.1f} | {:.2f} / {:.2f} | {:.2f} | {:.0f} %",
            "vicreg",
            1,
        ),
        (
            "vicreg --lr 3e-4`, after epoch 8 | {:.1f} | {:.2f} / {:.2f} | {:.2f} | {:.0f} %",
            "vicreg",
            8,
        ),
    ):
        yield COLLAPSE, text, health_row(name, epoch)
    n_monitored = load("objectives/brain_mri/cells/CASS_cnn_0.01_seed0.json")["metrics"]["n_train"]
    n_monitored //= 40
    yield COLLAPSE, "logits over {} training images", (n_monitored,)
    yield COLLAPSE, "Chance is {:.1f} %", (100 / n_monitored,)
    equation_1 = health("equation_1") + health("equation_1_lr_3e-4")
    share = [100 * row["monitor_seconds"] / row["seconds"] for row in equation_1 + health("vicreg")]
    yield COLLAPSE, "({:.1f} to {:.1f} % of the epoch's time", (min(share), max(share))

    def spreads(rows):
        return [row[f"{arm}_logits_spread"] for row in rows for arm in ("cnn", "vit")]

    def agreements(rows):
        return [row["agreement"] for row in rows]

    yield (
        COLLAPSE,
        "a spread of at most {:.3f} and an agreement of at most {:.3f}; under VICReg "
        "at least {:.3f} and {:.3f}",
        (
            max(spreads(equation_1)),
            max(agreements(equation_1)),
            min(spreads(health("vicreg"))),
            min(agreements(health("vicreg"))),
        ),
    )

    # collapse: scores
    def cell(folder):
        return load(f"objectives/{folder}/cells/CASS_cnn_0.01_seed0.json")["metrics"]

    yield (
        COLLAPSE,
        "({:,} test images); balanced accuracy on HAM10000 split by lesion ({:,} test "
        "images, {} classes: chance is {:.3f};",
        (
            cell("brain_mri")["n_test"],
            cell("ham10000")["n_test"],
            len(cell("ham10000")["classes"]),
            1 / len(cell("ham10000")["classes"]),
        ),
    )
    for name, row in (
        ("supervised, random weights", "Supervised"),
        ("DINO", "DINO"),
        ("CASS, equation 1", "CASS"),
        ("CASS, `--objective vicreg --lr 3e-4`", VICREG),
    ):
        yield (
            COLLAPSE,
            f"| {name} | {{:.3f}} | {{:.3f}} | {{:.3f}} | {{:.3f}} |",
            [mean(both_arms(f"objectives/{folder}", row, frac)) for folder, frac in COLUMNS],
        )
    for name, row, other in (
        ("DINO − supervised", "DINO", "Supervised"),
        ("equation 1 − supervised", "CASS", "Supervised"),
        ("VICReg − supervised", VICREG, "Supervised"),
        ("VICReg − equation 1", VICREG, "CASS"),
        ("DINO − equation 1", "DINO", "CASS"),
        ("VICReg − DINO", VICREG, "DINO"),
    ):
        yield (
            COLLAPSE,
            f"| {name} | {{}} | {{}} | {{}} | {{}} |",
            [bold_interval(f"objectives/{folder}", row, other, frac) for folder, frac in COLUMNS],
        )
    yield (
        COLLAPSE,
        "equation 1 scores worse than supervised training, by {:.3f};",
        (-difference("objectives/ham10000", "CASS", "Supervised", "0.01")[0],),
    )
    yield (
        COLLAPSE,
        "{:.3f} under VICReg against {:.3f} (supervised), {:.3f} (DINO) and {:.3f} (equation 1)",
        [
            mean(seeds("objectives/brain_mri", row, "vit", "0.01"))
            for row in (VICREG, "Supervised", "DINO", "CASS")
        ],
    )
    yield (
        COLLAPSE,
        "are {} with 1 % and {} with 10 %: neither excludes zero",
        [
            interval("objectives/brain_mri_8_epochs", VICREG, "Supervised", frac)
            for frac in ("0.01", "0.1")
        ],
    )
    for percent, frac in (("1 %", "0.01"), ("10 %", "0.1")):
        folder = "objectives/brain_mri_warm"
        yield (
            COLLAPSE,
            f"| {percent} | {{:.3f}} | {{:.3f}} | {{}} |",
            (
                mean(both_arms(folder, "CASS", frac)),
                mean(both_arms(folder, "Supervised", frac)),
                interval(folder, "CASS", "Supervised", frac),
            ),
        )
    brain, ham = (list(mean_minus_better(f"objectives/{d}")) for d in ("brain_mri", "ham10000"))
    yield (
        COLLAPSE,
        "between {:.3f} below and {:.3f} above the better arm on brain MRI, and "
        "between {:.3f} and {:.3f} below it on HAM10000",
        (-min(brain), max(brain), -max(ham), -min(ham)),
    )

    # experiments
    yield (
        EXPERIMENTS,
        "CASS {:.1f}, DINO {:.1f}, ratio {:.2f} | ratio {:.2f} |",
        (table_1("CASS"), table_1("DINO"), table_1("CASS") / table_1("DINO"), paper_time_ratio()),
    )
    for table, text in (
        ("4", "{} points with 1 % of the labels, {} with 10 % | {}, {} |"),
        ("5", "{} points with 1 %, {} with 10 % | {}, {} |"),
    ):
        gains = [our_gain(f"table{table}", f) for f in ("0.01", "0.1")]
        gains += [paper_gain(table, f) for f in ("0.01", "0.1")]
        yield EXPERIMENTS, text, [signed(x, 1) for x in gains]
    for name, table in (
        ("brain MRI, macro F1", "table4"),
        ("HAM10000, balanced accuracy", "table5"),
    ):
        yield (
            EXPERIMENTS,
            f"| {name} | {{}} | {{}} |",
            [interval(table, "CASS", "DINO", frac) for frac in ("0.01", "0.1")],
        )
    for row, name in (("DINO", "DINO"), ("CASS", "CASS"), ("Supervised", "supervised")):
        for arm, arm_name in (
            ("cnn", "ResNet-10-T"),
            ("vit", "ViT-Tiny"),
            ("mean", "mean of both"),
        ):
            cells = [seeds(t, row, arm, f) for t in ("table4", "table5") for f in ("0.01", "0.1")]
            yield (
                EXPERIMENTS,
                f"| {name} | {arm_name} | {{}} | {{}} | {{}} | {{}} |",
                [f"{mean(x):.3f} ± {stdev(x):.3f}" for x in cells],
            )
    labelled = [
        load(f"{t}/cells/CASS_cnn_{f}_seed0.json")["metrics"]["n_labelled"]
        for t in ("table4", "table5")
        for f in ("0.01", "0.1")
    ]
    yield (EXPERIMENTS, "is {} and {} for brain MRI, {} and {} for HAM10000", labelled)
    gains = [signed(paper_gain("2345", frac), 1) for frac in ("0.01", "0.1", "1")]
    yield (
        EXPERIMENTS,
        "Tables 2 to 5 give {} points with 1 % of the labels, {} with 10 % and {} with 100 %",
        gains,
    )
    yield (
        EXPERIMENTS,
        "orders of magnitude ({} to {})",
        (min(paper_spreads(), key=float), max(paper_spreads(), key=float)),
    )
    versions = load("table4/cells/CASS_cnn_0.01_seed0.json")["versions"]
    yield (
        EXPERIMENTS,
        "python {}, torch {}.",
        (versions["python"], versions["torch"].split("+")[0]),
    )
    yield (DIFFERENCES, "(G.0.3) gives {} and {} from its Tables 2–5, and the {} with 100 %", gains)

    # speed
    yield (
        SPEED,
        "| 3 rounds, median | {:.0f} img/s, {:.1f} GB | {:.0f} img/s, {:.1f} GB | "
        "{:.2f} | {:.0f} % |",
        step_row("small"),
    )
    yield (
        SPEED,
        "| 1 round | {:.2f} img/s, {:.1f} GB | {:.2f} img/s, {:.1f} GB | {:.2f} | {:.0f} % |",
        step_row("paper224"),
    )
    yield (
        SPEED,
        "of the first line were {:.2f}, {:.2f} and {:.2f}",
        round_ratios("small", "notebook", "ours"),
    )
    yield (
        SPEED,
        "its rounds were {:.2f}, {:.2f} and {:.2f}",
        round_ratios("small", "ceiling", "ours"),
    )
    yield (
        SPEED,
        "At {:.2f} img/s, 100 epochs of 5,000 training images at 224 px are {:.1f} days "
        "on this CPU; the defaults have 384 px, {:.1f} times the pixels",
        (
            images_per_second("paper224"),
            5e5 / images_per_second("paper224") / 86400,
            (384 / 224) ** 2,
        ),
    )
    yield (
        SPEED,
        "takes {:.1f} s (median of 3), {:.1f} % of an epoch of 5,000 images",
        (checkpoint_seconds(), 100 * checkpoint_seconds() / (5000 / images_per_second("small"))),
    )
    row = "from disk / decoded once | " + " | ".join(["{:.0f} / {:.0f}: ×{:.1f}"] * 3)
    yield SPEED, "| HAM10000 (JPEG): " + row, tuple(loader_row("ham10000/images"))
    yield SPEED, "| 1024×1024 JPEG: " + row, tuple(loader_row("1024x1024 JPEG"))
    yield (
        SPEED,
        "Python {}, torch {}, torchvision {};",
        [
            load("benchmark/step_small.json")[k].split("+")[0]
            for k in ("python", "torch", "torchvision")
        ],
    )


@pytest.mark.parametrize("name,text,values", list(figures()))
def test_figure_follows_from_results(name, text, values):
    assert text.format(*values) in page(name), f"{name}: results/ give: {text.format(*values)}"


@pytest.mark.parametrize(
    "row,other",
    [
        ("DINO", "Supervised"),
        ("CASS", "Supervised"),
        (VICREG, "Supervised"),
        (VICREG, "CASS"),
        ("DINO", "CASS"),
        (VICREG, "DINO"),
    ],
)
def test_better_is_said_only_where_the_interval_excludes_zero(row, other):
    """The text of docs/collapse.md names five; here they are, and no sixth."""
    signs = {
        (VICREG, "Supervised"): [1, 0, 0, 0],
        (VICREG, "DINO"): [1, 0, 0, 0],
        (VICREG, "CASS"): [0, 1, 0, 0],
        ("CASS", "Supervised"): [0, 0, -1, 0],
        ("DINO", "CASS"): [0, 0, 0, 1],
    }
    found = []
    for folder, frac in COLUMNS:
        _, low, high = difference(f"objectives/{folder}", row, other, frac)
        found.append((low > 0) - (high < 0))
    assert found == signs.get((row, other), [0, 0, 0, 0])


def test_demo_figures_in_readme():
    """DEMO_TIME, DEMO_SCORE and DEMO_BASELINE are those of results/demo.json."""
    text = page("README.md")
    assert "DEMO_" not in text, "README.md: fill in the figures of results/demo.json"
    demo = load("demo.json")
    assert {
        "seconds_pretrain",
        "seconds_finetune",
        "score",
        "baseline",
        "hardware",
        "versions",
        "command",
    } <= demo.keys()
    seconds = demo["seconds_pretrain"] + demo["seconds_finetune"]
    assert f"takes {seconds:.0f} s on two CPU cores" in text
    assert f"{demo['score']:.2f} with pre-training, {demo['baseline']:.2f} without" in text


# numbers that are settings, definitions or quotations of the paper, not results of ours
SETTINGS = {
    "README.md": {"3.10", "0.5", "1 %", "10 %", "75 %", "95 %"},
    "docs/collapse.md": {"3.1", "3e-4", "0.1", "0.25", "1 %", "10 %", "95 %", "4.303"},
    "docs/experiments.md": {"1 %", "10 %", "100 %", "95 %", "4.303", "+3.8", "+5.9"},
    "docs/speed.md": {"2.15"},
    "docs/data.md": {"1 %", "10 %", "0.44 MB"},
    "docs/outputs.md": {"95 %"},
    "docs/scores.md": {"95 %", "90 %", "3.2"},
    "docs/figures.md": {"10 %"},
    "docs/forms.md": set(),
    "CONTRIBUTING.md": {"95 %"},
}
NUMBER = re.compile(
    r"[+−±]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
    r"(?: ?(?:%|img/s|images/s|GB|MB|min\b|days\b|points\b|s\b))?"
)
NO_FIGURES = (
    r"takes \S+ s on|\d\.\d\d with pre-training, \d\.\d\d without|"  # the demo's
    r"```.*?```|`[^`\n]*`|\]\([^)]*\)|arXiv \d+\.\d+(v\d+)?|G\.0\.3"
)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_figure_without_a_source(name):
    text = page(name)
    for other, template, values in figures():
        if other == name:
            text = text.replace(template.format(*values), "")
    text = re.sub(NO_FIGURES, "", text, flags=re.S)
    found = {m.strip() for m in NUMBER.findall(text) if re.search(r"[.%+−±]|e-|[a-zA-Z]", m)}
    unknown = found - SETTINGS[name]
    assert not unknown, f"{name}: add an entry to figures() for {unknown}"


def test_readme_is_short_and_in_order():
    text = page("README.md")
    assert len(text.splitlines()) <= 130
    order = [
        "arXiv 2206.04170",
        "docs/method.svg",
        "pip install -r requirements.txt",
        "python -m tools.demo",
        "python pretrain.py --data /path --epochs 100 --bs 16",
        "python finetune.py --ckpt cnn.pt --frac 0.01",
        "## What we know about collapse",
        "## Your own data",
        "## Recipes",
        "# A laptop",
        "# 500 images",
        "# One GPU",
        "## New images",
        "```python",
        "`tools/`",
        "## Differences that change numbers",
        "## Limits",
        "pip install -r requirements-dev.txt",
        "python -m pytest -q",
        "## Citation",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_first_code_block_is_short():
    block = re.search(r"```python\n(.*?)```", page("README.md"), re.S)[1]
    assert len(block.splitlines()) <= 20
    compile(block, "README.md", "exec")


@pytest.mark.parametrize("name", PAGES)
def test_links_exist(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if not target.startswith("http"):
            path = (ROOT / name).parent / target.split("#")[0]
            assert path.exists(), f"{name}: {target} does not exist"


SCRIPTS = [
    "data.py",
    "pretrain.py",
    "finetune.py",
    "predict.py",
    "tools.dino",
    "tools.compare",
    "tools.folds",
    "tools.experiments",
    "tools.benchmark",
    *(
        f"tools.visualize {what}"
        for what in ("attention", "features", "curves", "confusion", "reliability")
    ),
]
HELPS = """
import io, json, runpy, sys
sys.path.insert(0, ".")
helps, stdout = {}, sys.stdout
for script in json.loads(sys.argv[1]):
    name, *words = script.split()
    sys.argv = [name, *words, "--help"]
    sys.stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    try:
        if name.endswith(".py"):
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        ok = not end.code
    except Exception as error:
        ok = False
        print(repr(error))
    helps[script] = [ok, sys.stdout.buffer.getvalue().decode()]
print(json.dumps(helps), file=stdout)
"""


@pytest.fixture(scope="module")
def flags():
    """{script: the flags that its --help names}; all in one process, which imports torch once."""
    done = subprocess.run(
        [sys.executable, "-c", HELPS, json.dumps(SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout)
    assert not (failed := {s: text for s, (ok, text) in helps.items() if not ok}), failed
    known = {script: set(re.findall(r"--[a-z][\w-]*", text)) for script, (_, text) in helps.items()}
    known["tools.folds"] |= known["pretrain.py"] | known["finetune.py"]  # which it hands on
    return known


def commands(text):
    """(script, its flags) of every command in the code blocks and inline code of a page."""
    code = "\n".join(
        re.findall(r"```[a-z]*\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    )
    for line in re.split(r"\n|&&", code):
        if line.lstrip().startswith("#"):
            continue
        found = re.search(r"(?:^|\s)(?:-m (tools\.visualize \w+|tools\.\w+)|(\w+\.py))(.*)", line)
        if found:
            yield found[1] or found[2], re.findall(r"--[a-z][\w-]*", found[3])


@pytest.mark.parametrize("name", PAGES)
def test_flags_of_commands_are_known(name, flags):
    for script, used in commands(page(name)):
        if script in flags:
            assert set(used) <= flags[script], f"{name}: {script} does not know all of {used}"


@pytest.mark.parametrize("name", PAGES)
def test_flags_in_the_text_are_known(name, flags):
    known = set.union(*flags.values()) | {"--check"}
    known |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    used = set(re.findall(r"--[a-z][\w-]*", page(name)))
    assert used <= known, f"{name}: no script knows {used - known}"


def test_every_page_is_reached_from_the_readme():
    assert all(f"]({name})" in page("README.md") for name in PAGES if name != "README.md")
