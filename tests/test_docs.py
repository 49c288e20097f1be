"""README, docs/ and CONTRIBUTING: every figure follows from results/, links and flags exist.

figures() yields a page, a text with {} for each figure, and the figures recomputed. A number with
a decimal point, a sign or a unit that no entry covers fails too, unless SETTINGS names it.
"""

import functools
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, median

import evidence
import pytest
from conftest import rows
from scipy import stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = ["README.md", "CONTRIBUTING.md", "results/README.md"]
PAGES += [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def load(path):
    return json.loads((RESULTS / path).read_text())


@functools.cache
def health(name):
    lines = (RESULTS / f"collapse/{name}/log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def signed(x, digits=3):
    return f"{x:+.{digits}f}".replace("-", "−")


def paper_gain(tables, frac, without=()):
    """G.0.3: CASS minus DINO, summed over both arms, mean over data sets, in points."""
    paper = json.loads(page("tools/paper.json"))["tables"]
    gains = []
    for table in tables:
        cells = {k: float(v.split("±")[0]) for k, v in paper[table]["cells"].items()}
        arms = [arm for arm in ("cnn", "vit") if (table, arm) not in without]
        if f"CASS|cnn|{frac}" in cells:
            pairs = [(cells[f"CASS|{arm}|{frac}"], cells[f"DINO|{arm}|{frac}"]) for arm in arms]
            gains.append(sum(cass - dino for cass, dino in pairs))
    return 100 * mean(gains)


def paper_spreads():
    """Every figure behind a ± in the paper's tables but one misprint, "0011"."""
    tables = json.loads(page("tools/paper.json"))["tables"].values()
    cells = [cell for table in tables for cell in table.get("cells", {}).values() if "±" in cell]
    return {cell.split("±")[1].strip() for cell in cells} - {"0011"}


def paper_score(table, key):
    cells = json.loads(page("tools/paper.json"))["tables"][table]["cells"]
    return 100 * float(cells[key].split("±")[0])


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


def checkpoint_share():
    return 100 * checkpoint_seconds() / (5000 / images_per_second("small"))


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


def monitor_shares():
    """Of each epoch's time, in per cent."""
    epochs = [x for name in ("equation_1", "equation_1_lr_3e-4", "vicreg") for x in health(name)]
    return [100 * x["monitor_seconds"] / x["seconds"] for x in epochs]


def spreads(rows):
    return [row[f"{arm}_logits_spread"] for row in rows for arm in ("cnn", "vit")]


def claims(runs, missed):
    """Of the table of claims, what other pages do not say. missed: patience 5 and 15, of the runs
    those that stopped before their best epoch."""
    TABLE, demo = "results/README.md", load("demo.json")
    ends = [100 * x for k in missed for x in stats.binomtest(k, runs).proportion_ci()]
    shares = "{1} of {0} runs ({3:.0f} to {4:.0f} %); of 15: {2} of {0} ({5:.0f} to {6:.0f} %)"
    yield TABLE, shares, (runs, *missed, *ends)
    scores = demo["score"], demo["baseline"], demo["n"], demo["n_test"]
    text = "{:.2f} with pre-training, {:.2f} without (none) | {} seed, {} images"
    yield TABLE, text, scores
    seconds = sorted(map(sum, demo["seconds"]))
    text = "takes {1:.0f} s | {0:.0f} to {2:.0f} s (range) | 3 runs"
    yield TABLE, text, seconds
    yield TABLE, "the logits {:.3f} and {:.3f} (none)", spreads(health("equation_1")[:1])
    yield TABLE, "spread at least {:.3f} (none)", (min(spreads(health("vicreg"))),)
    share = monitor_shares()
    text = "{:.1f} to {:.1f} % of an epoch (range) | {} epochs of 3 runs"
    yield TABLE, text, (min(share), max(share), len(share))
    ratios = round_ratios("small", "notebook", "ours")
    values = images_per_second("small"), median(ratios), min(ratios), max(ratios)
    text = "{:.0f} img/s on two cores | {:.2f} times the notebook's operations ({:.2f} to {:.2f}, "
    yield TABLE, text, values
    ratios = round_ratios("paper224", "notebook", "ours")
    values = images_per_second("paper224"), median(ratios), len(ratios)
    yield TABLE, "{:.2f} img/s | {:.2f} times the notebook's operations (none) | {} round", values
    figures = load("benchmark/data.json")["figures"]
    each = [[a / b for a, b in zip(x["ours"], x["from_disk"])] for x in figures]
    ends = [f(map(g, each)) for g, f in ((median, min), (median, max), (min, min), (max, max))]
    yield TABLE, "{:.1f} to {:.1f} times, medians; {:.1f} to {:.1f}, range of rounds", ends
    values = checkpoint_seconds(), checkpoint_share()
    yield TABLE, "takes {:.1f} s | {:.1f} % of an epoch of 5,000 images", values
    power = [100 * float(x["unlike"]) for x in rows(RESULTS / "evidence/outside.csv")]
    yield TABLE, "{:.0f} to {:.0f} % of images of other sets", (min(power), max(power))
    cells = sorted(rows(RESULTS / "evidence/deletion.csv"), key=lambda x: float(x["difference"]))
    text = "area {} ({} to {}) to {} ({} to {}) | {} cases of {} images"
    for kind in (True, False):
        found = [x for x in cells if x["arm"].startswith("vit") == kind]
        ends = [
            signed(float(x[k]))
            for x in (found[0], found[-1])
            for k in ("difference", "low", "high")
        ]
        yield TABLE, text, (*ends, len(found), found[0]["n"])


def pretrained_rows():
    """Texts of the trials of equation 1 and VICReg, as in docs/collapse.md."""
    for objective, rate in product(
        ("equation 1", "VICReg"), "1e-3 3e-4 1e-4 3e-5 1e-5 3e-6".split()
    ):
        row = f"{objective}, {rate}"
        cell = trial(row)
        arms, last, start = ("cnn", "vit"), cell["log"][-1], cell["log"][0]["start"]
        flagged = [arm for arm in arms if any(x[f"{arm}_logits_collapsed"] for x in cell["log"])]
        words = {0: "none", 1: "ViT", 2: "both"}[len(flagged)]
        spread = [f"{last[f'{arm}_logits_spread']:.3f}" for arm in arms]
        ranks = [[x[f"{arm}_features_effective_rank"] for x in (start, last)] for arm in arms]
        score = evidence.trial_score(cell)
        ranks = " | ".join(f"{a:.0f} to {b:.0f}" for a, b in ranks)
        name = row.replace(rate, f"`--lr {rate}`")
        yield f"| {name} | {words} | {' / '.join(spread)} | {ranks} | {score:.3f} |"


def times_of_dino():
    """Seconds of an epoch of CASS over those of both arms of DINO: mean, ends of its t interval."""
    ratios = []
    for seed in range(3):
        each = []
        for name, groups in (("CASS", ["cnn+vit"]), ("DINO", ["cnn", "vit"])):
            log = load(f"times/cells/brain_mri_{name}_seed{seed}.json")["log"]
            medians = [median(x["seconds"] for x in log if x["arms"] == g) for g in groups]
            each.append(sum(medians))
        ratios.append(each[0] / each[1])
    return mean(ratios), *stats.t.interval(0.95, 2, mean(ratios), stats.sem(ratios))


@functools.cache
def trials():
    return evidence.cells_of("trials")


def trial(row):
    return trials()[row][100]


def figures():
    """(page, text, values) of every figure."""
    README, COLLAPSE, EXPERIMENTS = "README.md", "docs/collapse.md", "docs/experiments.md"
    SPEED = "docs/speed.md"

    # README
    text = "normalized logits is {:.3f} and {:.3f} on a scale"
    yield README, text, spreads(health("equation_1")[:1])
    yield README, "the {:.0f} images/s [measured]", (images_per_second("small"),)

    mid, *ends = times_of_dino()
    text = "an epoch takes {:.0f} % less: ratio {:.3f} ({:.3f} to {:.3f}) |"
    yield EXPERIMENTS, text, (100 - 100 * mid, mid, *ends)
    yield (
        "results/README.md",
        "| ratio {:.3f} ({:.3f} to {:.3f}) | 3 seeds of 3 epochs",
        (mid, *ends),
    )
    for text in ("to {:.2f} and {:.2f} after 2 epochs", "last loss {:.2f} and {:.2f}; at"):
        name = EXPERIMENTS if "after" in text else "results/README.md"
        yield name, text, evidence.last_losses(trial("DINO, 1e-3"))
    yield (
        "results/README.md",
        "`3e-4`: {:.2f} and {:.2f} (none)",
        evidence.last_losses(trial("DINO, 3e-4")),
    )
    calibrated = [x for x in rows(RESULTS / "calibration/calibration.csv") if "brain" in x["run"]]
    errors = [float(x["ece"]) for x in calibrated]  # of the CNN, the ViT and their mean
    errors = errors[2], *errors[:2]
    yield "docs/scores.md", "(error {:.3f} against {:.3f} and {:.3f}, one seed)", errors
    yield "results/README.md", "error {:.3f}, arms {:.3f} and {:.3f};", errors
    chosen = {}  # {(arm, seed): {patience: the epoch that it chooses}}
    for row in rows(RESULTS / "pretrained/patience.csv"):
        run = chosen.setdefault((row["arm"], row["seed"]), {})
        run[row["patience"]] = int(row["best_epoch"])
    missed = [sum(x[n] < x["50"] for x in chosen.values()) for n in ("5", "15")]
    yield (
        README,
        "in {1} of {0} runs on one data set the paper's patience of 5 epochs would have stopped "
        "before the lowest validation loss of 50 epochs, one of 15 in {2} (",
        (len(chosen), *missed),
    )

    compared = evidence.primary(evidence.chosen()["chosen objective"])
    n = min(difference[4] for _, _, _, difference, *_ in compared)
    shown = [
        f"{evidence.SETS[folder]}, {evidence.percent(frac)}: {evidence.shown(difference)}"
        for folder, frac, _, difference, _, verdict in compared
        if verdict in ("better", "worse")
    ]
    k, shown = len(shown), "; ".join(shown).replace("*", "")
    yield README, "After {} of its seeds, our best setting", (n,)
    yield README, "in {} of the four comparisons named in advance: {} macro F1", (k, shown)
    text = "differences in {1} of four named comparisons ({2}); being measured, by a "
    text += "[protocol](protocol.md) | {0} seeds so far"
    yield "results/README.md", text, (n, k, shown)

    yield from claims(len(chosen), missed)

    faults = [*(ROOT / "tests/faults").glob("*.patch")]
    yield "CONTRIBUTING.md", "holds {} small planted faults", (len(faults),)

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
    text = "takes {:.0f} and {:.0f} min on a laptop | from the {:.0f} img/s above"
    values = minutes(5000, 20), minutes(500, 100), images_per_second("small")
    yield "results/README.md", text, values

    # the deletion test
    cells = rows(RESULTS / "evidence/deletion.csv")
    cnns, vits = ([c for c in cells if c["arm"].startswith("vit") == kind] for kind in (0, 1))
    yield (
        "docs/figures.md",
        "beat all 19 in {:.0f} % to {:.0f} % of the images. The CNN's do in three of four, "
        "and beat all 19 in {:.0f} % to {:.0f} %",
        [
            100 * f(float(c["beats_all_random"]) for c in x)
            for x in (vits, cnns)
            for f in (min, max)
        ],
    )
    yield "docs/figures.md", "on {} test images of each", (cells[0]["n"],)

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
    lines = [*pretrained_rows()]
    yield from ((COLLAPSE, line, ()) for line in lines)
    ranks = [re.findall(r"(\d+) to (\d+) \| 0", x)[0] for x in lines if "equation 1" in x]
    after = [int(x) for _, x in ranks]
    text = "| {} to {} … {} at six rates (none)"
    yield "results/README.md", text, (ranks[0][0], min(after), max(after))
    score = evidence.trial_score(trial("direct use"))
    found = [float(x.split()[-2]) for x in lines if "| none |" not in x]
    text = "flagged runs score {:.3f} to {:.3f}, direct use of the arms {:.3f}"
    yield COLLAPSE, text, (min(found), max(found), score)
    text = "| flagged: {:.3f} to {:.3f}, direct use {:.3f} (none)"
    yield "results/README.md", text, (min(found), max(found), score)
    cells = [evidence.cells_of("brain_mri")[row][0] for row in (evidence.BASE, evidence.PAPERS)]
    seconds = [x.get("seconds") or 0 for cell in cells for x in cell["scores"].values()]
    seconds += [cell["pretrain_seconds"] for cell in cells]
    yield "results/README.md", "| {:.0f} min of training on one core,", (sum(seconds) / 60,)
    # a retrieval above zero is at least that of one image of these
    n_monitored = round(
        1 / min(row["retrieval"] for row in health("equation_1") if row["retrieval"])
    )
    yield COLLAPSE, "logits over {} training images", (n_monitored,)
    yield COLLAPSE, "Chance is {:.1f} %", (100 / n_monitored,)
    equation_1 = health("equation_1") + health("equation_1_lr_3e-4")
    share = monitor_shares()
    yield COLLAPSE, "({:.1f} to {:.1f} % of the epoch's time", (min(share), max(share))

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

    each = []
    for objective in ("equation 1", "VICReg"):
        cells = [seeds[100] for row, seeds in trials().items() if row.startswith(objective)]
        each.append([cell["log"][-1]["agreement"] for cell in cells])
    text = "{:.2f} to {:.2f} under equation 1, {:.2f} to {:.2f} under VICReg, over all rates"
    yield COLLAPSE, text, [f(x) for x in each for f in (min, max)]

    # experiments
    text = "(spread of the logits {:.3f} and {:.3f}, where 1 is spread out)"
    yield EXPERIMENTS, text, spreads(health("equation_1")[:1])
    text = "are flagged at the paper's rate ({:.3f} and {:.3f})"
    yield EXPERIMENTS, text, spreads(trial("equation 1, 1e-3")["log"][-1:])
    score, variance = json.loads(page("tools/paper.json"))["tables"]["4"]["cells"][
        "CASS|cnn|0.01"
    ].split("±")
    text = "{} beside a mean of {:.3f}, a standard deviation of {:.2f}"
    yield EXPERIMENTS, text, (variance, float(score), float(variance) ** 0.5)
    gains = [signed(paper_gain("2345", frac), 1) for frac in ("0.01", "0.1")]
    gains += [signed(paper_gain("2345", frac, [("4", "cnn")]), 2) for frac in ("0.01", "0.1")]
    yield "results/README.md", "| {} and {}, not +3.8 and +5.9", gains[:2]
    gains += [signed(paper_gain("2345", "1"), 1)]
    yield (
        EXPERIMENTS,
        "its Tables 2 to 5 give {} and {}; {} and {} come out if the ResNet-50 on brain MRI is "
        "left out. With 100 % they give the {} that",
        gains,
    )
    yield (
        EXPERIMENTS,
        "orders of magnitude ({} to {})",
        (min(paper_spreads(), key=float), max(paper_spreads(), key=float)),
    )
    cnns = ("ResNet-18", "ResNet-50", "ResNet-200")
    gain = mean(
        paper_score("12", f"{x} + ViT-B/16|cnn|1") - paper_score("13", f"{x}|cnn|1") for x in cnns
    )
    yield EXPERIMENTS, "over supervised CNNs is {:.1f} points", (gain,)
    lost = paper_score("6", "batch 16|vit|1") - paper_score("6", "batch 8|vit|1")
    yield EXPERIMENTS, "its figures lose {:.1f} points", (lost,)
    hours, minutes_of_dino = re.findall(
        r"\d+", json.loads(page("tools/paper.json"))["tables"]["1"]["times"]["Brain MRI"][0]
    )
    less = 100 * (1 - 600 / (60 * int(hours) + int(minutes_of_dino)))
    yield (
        EXPERIMENTS,
        "of the {} hours and {} minutes of Table 1, they are {:.0f} % less",
        (hours, minutes_of_dino, less),
    )

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
        (checkpoint_seconds(), checkpoint_share()),
    )
    row = "from disk / decoded once | " + " | ".join(["{:.0f} / {:.0f}: ×{:.1f}"] * 3)
    yield SPEED, "| HAM10000, 200×150 JPEG: " + row, tuple(loader_row("ham10000/images"))
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


def test_rates_at_which_equation_1_is_flagged_from_pre_trained_weights():
    """README and results/README.md: both arms, the ViT alone, none; VICReg at no rate."""
    flagged = {}
    for file in (RESULTS / "pretrained/trials/cells").glob("*.json"):
        cell = json.loads(file.read_text())
        if not cell["row"].startswith(("DINO", "direct use")):
            for arm in ("cnn", "vit"):
                found = any(row[f"{arm}_logits_collapsed"] for row in cell["log"])
                flagged.setdefault(cell["row"], []).append(arm) if found else None
    both, one = ["cnn", "vit"], ["vit"]
    expected = {"equation 1, 1e-3": both, "equation 1, 3e-4": both, "equation 1, 1e-4": one}
    assert flagged == expected


def test_what_is_said_of_the_maps_follows_from_their_cells():
    """Better than random: all ViTs, three of four CNNs; than untrained: ViTs, CNNs on brain MRI."""
    for cell in rows(RESULTS / "evidence/deletion.csv"):
        vit, brain = cell["arm"].startswith("vit"), cell["run"].startswith("brain")
        lite0_on_ham = cell["arm"] == "tf_efficientnet_lite0" and not brain
        assert (float(cell["high"]) < 0) == (not lite0_on_ham), cell
        assert (float(cell["over_untrained_high"]) < 0) == (vit or brain), cell


def test_demo_figures_in_readme():
    """The median of three runs, and the scores; the commands are those of the page."""
    text, demo = page("README.md"), load("demo.json")
    assert {"n", "seeds", "hardware", "versions"} <= demo.keys()
    assert "\n".join(demo["command"]) in text
    seconds = sorted(map(sum, demo["seconds"]))[1]
    assert f"takes {seconds:.0f} s on two CPU cores" in text
    assert f"{demo['score']:.2f} with pre-training, {demo['baseline']:.2f} without" in text


# numbers that are settings, definitions or quotations of the paper, not results of ours
SETTINGS = {
    "README.md": {"3.10", "0.5", "1 %", "10 %", "30 %", "75 %", "95 %"}
    | {"1e-3", "1e-4", "3e-5", "1e-5"},
    "docs/collapse.md": {"1 %", "10 %", "3.1", "3e-4", "0.1", "0.25"},
    "docs/experiments.md": {"0.996", "3.1", "1.1", "2.2", "4.3", "5.6", "3.4", "69 %", "3%", "50%"}
    | {"2.1", "3e-4", "8.32"}
    | {"1 %", "10 %", "100 %", "+3.8 points", "+5.9"},
    "docs/speed.md": {"2.15"},
    "docs/data.md": {"1 %", "10 %", "0.44 MB"},
    "docs/outputs.md": {"95 %"},
    "docs/scores.md": {"95 %", "90 %", "3.2"},
    "docs/figures.md": {"95 %"},
    "docs/forms.md": set(),
    "CONTRIBUTING.md": {"95 %"},
    "results/README.md": {"95 %"},
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
        "docs/demo.npz",
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
    "tools.report",
    "tools.maps",
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
        found = re.search(r"(?:^|\s)(?:-m (tools\.\w+)|(\w+\.py))(.*)", line)
        if found:
            yield found[1] or found[2], re.findall(r"--[a-z][\w-]*", found[3])


@pytest.mark.parametrize("name", PAGES)
def test_flags_of_commands_are_known(name, flags):
    for script, used in commands(page(name)):
        if script in flags:
            assert set(used) <= flags[script], f"{name}: {script} does not know all of {used}"


@pytest.mark.parametrize("name", PAGES)
def test_flags_in_the_text_are_known(name, flags):
    known = set.union(*flags.values()) | {"--check", "--script"}
    known |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    used = set(re.findall(r"--[a-z][\w-]*", page(name)))
    assert used <= known, f"{name}: no script knows {used - known}"


def test_every_page_is_reached_from_the_readme():
    assert all(f"]({name})" in page("README.md") for name in PAGES if name != "README.md")
