"""What is shipped: the light import, the contents of the wheel, and the wheel alone with its
declared dependencies."""

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from processes import PATIENCE

import planner
from executor.measuring import software

ROOT = Path(__file__).parents[1]
HEAVY = ("matplotlib", "ray", "simpy", "torch", "transformers", "vllm")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `cwd`; what it printed is shown when it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ""} | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


@pytest.mark.parametrize(
    "code",
    [
        "import planner.cli",
        "import executor",
        "sys.argv = ['plan', '--help']; from planner.cli import main; main()",
        "sys.argv = ['plan', 'execute', '--help']; from planner.cli import main; main()",
    ],
)
def test_imports_and_help_stay_light(code: str) -> None:
    script = f"""
import sys
import tomllib
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted({set(HEAVY)} & sys.modules.keys()))
"""
    done = run(sys.executable, "-c", script, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, cwd=ROOT)
    (built,) = directory.glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_and_the_profiles(wheel: Path) -> None:
    info = f"splitplan-{planner.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"planner", "executor", info}
    assert "plan = planner.cli:main" in entry_points
    tracked = subprocess.run(
        ["git", "ls-files", "profiles"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert {f"planner/{path}" for path in tracked} <= names
    assert {
        "planner/py.typed",
        "planner/profiles/devices.toml",
        f"{info}/licenses/LICENSE",
    } <= names
    assert any(
        name.startswith("planner/profiles/workloads/") and name.endswith(".toml") for name in names
    )


def base_requirements(wheel: Path) -> list[Requirement]:
    """What the wheel requires without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requires = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    return needed(requires, frozenset())


def needed(requires: list[str], extras: frozenset[str]) -> list[Requirement]:
    """The requirements that hold in this interpreter, given the extras asked for."""
    parsed = (Requirement(line) for line in requires)
    return [
        r
        for r in parsed
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras | {""})
    ]


def closure(requirements: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The installed distributions that satisfy the requirements, and theirs, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    queue = list(requirements)
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        found[key[0]] = distribution = metadata.distribution(requirement.name)
        queue += needed(distribution.requires or [], key[1])
    return found


def test_what_is_declared_is_what_was_tried() -> None:
    """From the oldest to the newest version of docs/run.md, each with all of its patches."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        r.name: str(r.specifier) for r in map(Requirement, extras["execute"] + extras["vllm"])
    }
    row = re.compile(
        r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| (?:[\d.]+, )*([\d.]+) \|$", re.MULTILINE
    )
    rows = row.findall((ROOT / "docs" / "run.md").read_text())
    assert len(rows) == len(software.NEWEST_ON_GPUS)
    for name, *tried in rows:
        oldest, newest, on_gpus = map(Version, tried)
        bounds = f"<{newest.major}.{newest.minor + 1},>={oldest.major}.{oldest.minor}"
        assert declared[name] == bounds
        assert software.NEWEST_ON_GPUS[name] == f"{on_gpus.major}.{on_gpus.minor}"


def test_base_install_requires_nothing_heavy(wheel: Path) -> None:
    names = closure(base_requirements(wheel)).keys()
    assert {"click", "networkx", "numpy", "pydantic", "simpy"} <= names
    assert not names & {"torch", "ray", "vllm", "transformers", "safetensors", "tensorboard"}


@pytest.mark.slow
def test_wheel_alone_searches(wheel: Path, tmp_path: Path) -> None:
    """The wheel in a venv of its own that sees its declared dependencies (links to those installed
    here) and no more: an import that is not declared fails here, and torch and ray are truly
    absent."""
    env = tmp_path / "venv"
    venv.create(env, with_pip=False, symlinks=True)
    python = env / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        f"--python={python}",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )

    links = tmp_path / "dependencies"
    links.mkdir()
    for distribution in closure(base_requirements(wheel)).values():
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(distribution.locate_file(top))
    (site,) = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{links}\n")

    script = "import planner, sys; from importlib.util import find_spec; "
    script += "print(planner.__file__, *(name for name in sys.argv[1:] if find_spec(name)))"
    (file,) = run(python, "-c", script, "torch", "ray", "transformers", cwd=tmp_path).stdout.split()
    assert Path(file).is_relative_to(site)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(
        env / "bin" / "plan", "search", "--gpus", "16", cwd=elsewhere, MPLCONFIGDIR=str(tmp_path)
    )
    assert "colocated" in done.stdout and "split" in done.stdout
    plan = json.loads((elsewhere / "best.json").read_text())
    assert plan["schema"].startswith("splitplan/plan/")
    assert sum(len(pool["gpus"]) for pool in plan["pools"].values()) <= 16
    assert (elsewhere / "best.png").read_bytes().startswith(b"\x89PNG")
