"""The shape of the code: imports in one direction, sizes, and the method copied elsewhere.

python tests/test_house.py prints the sizes.
"""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from conftest import ARMS, ROOT, draw_classes

import pretrain

METHOD = ("cass", "losses", "swa")
SCRIPTS = ("pretrain", "finetune", "predict")
CORE = (*METHOD, "data", "pretrain", "finetune")
LIBRARIES = {"torch", "torchvision", "timm", "numpy", "PIL", "tqdm", "safetensors"}


def modules():
    """{name: path} of all code but the tests."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def lines(name):
    return len(modules()[name].read_text().splitlines())


def imports(name):
    """Modules that a module imports anywhere, ours by their full names."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            if node.module in ("common", "tools"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def functions(name):
    """{function: lines} of a module, methods included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.walk(ast.parse(modules()[name].read_text()))
    return {
        node.name: node.end_lineno - node.lineno + 1 for node in tree if isinstance(node, kinds)
    }


def loaded_by(name):
    """Our modules in memory after `import name`."""
    code = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return [m for m in done.stdout.split() if m in modules()]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_one_way(name):
    ours = imports(name) & modules().keys()
    root = {m for m in modules() if "." not in m}
    assert not (set(SCRIPTS) - {name}) & ours or name.startswith("tools."), "a script imports one"
    if name in METHOD:
        assert ours <= {"losses"}
    elif name.startswith("common"):
        assert ours <= {m for m in modules() if m.startswith("common.")} | {"cass", "losses"}
    elif name in root:
        assert not any(m.startswith("tools") for m in ours)


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_the_named_packages_are_imported(name):
    others = {m.split(".")[0] for m in imports(name)} - set(sys.stdlib_module_names)
    allowed = LIBRARIES | ({"matplotlib"} if name in ("tools.maps", "tools.report") else set())
    allowed |= {"tools.maps": {"captum"}, "tools.report": {"jinja2"}}.get(name, set())
    allowed |= {"pydicom"} if name == "common.dicom" else set()
    assert others <= allowed | {"common", "tools", *(m for m in modules() if "." not in m)}


def test_sizes():
    """What adds must remove. The goals: common/ 1900, `import pretrain` 2000, the core 950."""
    common = sum(lines(m) for m in modules() if m.startswith("common."))
    assert sum(map(lines, modules())) <= 5200
    assert common <= 2549
    assert sum(map(lines, loaded_by("pretrain"))) <= 1999
    assert sum(map(lines, CORE)) <= 984
    assert functions("pretrain")["train"] <= 40
    assert statistics.median(n for m in CORE for n in functions(m).values()) <= 15


@pytest.mark.parametrize("name", CORE)
def test_functions_are_short(name):
    sizes = functions(name)
    assert {f: n for f, n in sizes.items() if n > 40 and f != "main"} == {}


def test_pretraining_has_few_flags(script):
    _, said, _ = script(pretrain, "--help")
    assert len(re.findall(r"^  --", said, re.M)) <= 40


def python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_the_method_works_when_copied(tmp_path):
    """The first block of the README, beside the three files and nothing else."""
    for name in METHOD:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (block, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    done = python(block + "\nassert set(arms) == {'cnn', 'vit'}, arms", tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_docstring_of_cass_is_a_training_step(tmp_path):
    for name in METHOD[:2]:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    doc = ast.get_docstring(ast.parse((ROOT / "cass.py").read_text()))
    step = "\n".join(line[4:] for line in doc.splitlines() if line.startswith("    "))
    code = "import torch\nfrom cass import CASS, build_arm\n" + step
    before = "before = [p.clone() for p in model.parameters()]\n    images = "
    code = code.replace("images = ", before.replace("\n    ", "\n"), 1)
    moved = "[not torch.equal(a, b) for a, b in zip(before, model.parameters())]"
    code += f"\nassert sum({moved}) > 0.8 * len(before) and torch.isfinite(loss)"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


HIDE = """
import json, os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in "SIGHUP SIGKILL SIGCHLD SIGUSR1 SIGALRM pthread_sigmask setitimer".split():
    delattr(signal, name)
for name in ("fork", "forkpty", "getuid", "sched_getaffinity"):
    delattr(os, name)
sys.path.insert(0, os.getcwd())
import runpy, types
from common import cli
cli.os = types.SimpleNamespace(**{**vars(os), "name": "nt"})  # the library's own must stay
for sys.argv in json.loads(sys.argv[1]):
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    print("status", status)
"""


def test_the_two_commands_do_without_what_other_systems_lack(tmp_path):
    """As on Windows and macOS: modules, signals and functions of Linux are hidden. The third
    command is a wrong one."""
    images = draw_classes(tmp_path / "images", {"a": 14, "b": 10})
    out = tmp_path / "run"
    commands = (
        ["pretrain.py", "--data", images, *ARMS, "--epochs", 1, "--out", out],
        ["finetune.py", "--ckpt", out / "cnn.pt", "--epochs", 1],
        ["finetune.py", "--ckpt", "no.pt"],
    )
    environment = {**os.environ, "CASS_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", HIDE, json.dumps([[*map(str, x)] for x in commands])]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.findall(r"status (\d+)", done.stdout) == ["0", "0", "2"], done.stderr
    assert done.stderr.endswith("no.pt: there is no such file\n") and "Trace" not in done.stderr


if __name__ == "__main__":
    for module in sorted(modules()):
        print(f"{lines(module):5}  {module}")
    inside = [m for m in modules() if m.startswith("common.")]
    needed = loaded_by("pretrain")
    readme = (ROOT / "README.md").read_text()
    help_text = subprocess.run(
        [sys.executable, "pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    loop = functions("pretrain")["train"]
    sizes = [n for m in CORE for n in functions(m).values()]
    print(f"{sum(map(lines, modules())):5}  in all (5200)")
    print(f"{sum(map(lines, inside)):5}  common/ (1900)")
    print(f"{sum(map(lines, CORE)):5}  six core files (950)")
    print(f"{sum(map(lines, needed)):5}  loaded by `import pretrain`, {len(needed)} modules (2000)")
    print(f"{loop:5}  pretrain.train, its docstring included (40 without)")
    print(f"{statistics.median(sizes):5}  median function of the core files (15)")
    print(f"{len(re.findall(r'^  --', help_text, re.M)):5}  flags of pretrain.py (40)")
    print(f"{len(readme.splitlines()):5}  lines of the README (130), {len(readme.split())} words")
