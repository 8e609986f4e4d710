"""What the commands print and write today, kept under `tests/golden/` and held to the letter.

A change that is meant to change an answer renews the files, and its commit shows how they differ:

    python -m pytest tests/test_golden.py --renew-golden

The reports of the studies under `reports/h200/` are golden files too. Each is written anew by

    plan study reports/h200/NAME.toml --report
"""

import json
import math
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from planner.cli import main

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
REPORTS = Path("reports") / "h200"
MEASURED = (path.parent.name for path in (ROOT / REPORTS).glob("*/results.json"))
STUDIES = sorted(MEASURED)

BEST = "--out out/best.json --no-picture"
PROFILE = "--profile profiles/h200/1.5b-4gpu.json"
ALL_PROFILES = " ".join(
    f"--profile profiles/h200/1.5b-{name}.json"
    for name in ("1gpu", "2gpu", "2gpu-tp", "4gpu", "tp")
)
BASELINES = ("colocated", "split", "split-parallel", "standalone", "one-step-off")

# Name of a directory under tests/golden -> command. It finds the shipped profiles in `profiles`,
# the golden files in `golden`, and writes to `out`. A plan is read from the golden files, not from
# the test before, so that any test runs alone.
COMMANDS = {
    "search-7b": f"search --gpus 16 {BEST}",
    "search-tutorial": f"search --gpus 8 --workload tutorial {BEST}",
    "search-7b-8": f"search --gpus 8 {BEST}",
    "search-grpo": f"search --gpus 16 --workload 7b-grpo {BEST}",
    "search-70b": f"search --gpus 64 --workload 70b {BEST}",
    "search-70b-too-few": f"search --gpus 1 --workload 70b {BEST}",
    "search-profile": f"search --gpus 4 --workload h200-1.5b {PROFILE} {BEST}",
    "search-profiles": f"search --gpus 4 --workload h200-1.5b {ALL_PROFILES} {BEST}",
    "search-two-kinds": f"search --cluster golden/two-kinds.toml --workload 1.5b {BEST}",
    "search-p95": f"search --gpus 4 --workload 1.5b --objective p95 {BEST}",
    "search-cost": f"search --gpus 12 --device a100 --workload tutorial --objective cost {BEST}",
    "search-pins": f"search --gpus 8 --pin actor/critic --pin rollout=4 --scenarios 1 {BEST}",
    "search-stale": f"search --gpus 8 --workload h200-1.5b-512 --max-staleness 3 --keep 9 {BEST}",
    **{f"baseline-{name}": f"baseline {name} --gpus 16 --out out/plan.json" for name in BASELINES},
    "explain": "explain golden/search-profile/best.json",
    "explain-two-kinds": "explain golden/search-two-kinds/best.json",
    "what-if": "what-if golden/search-profile/best.json --gpus 2,8",
    "pareto": "pareto --gpus 2,4 --workload h200-1.5b --out out/p.png --csv out/p.csv",
    "simulate": "simulate golden/search-7b/best.json --steps 4 --timeline out/timeline.json",
    "trace": "simulate golden/search-profile/best.json --steps 3 --trace out/trace.json",
    "space": "space --gpus 4 --workload 1.5b",
    "judge": "judge profiles/h200/7b.json profiles/h200/7b-tp.json --out out/page.md",
}

# Here layouts of pools that wait for another one give equal step times, and rounding chooses among
# them. NumPy rounds as the processor's vector instructions do: on others than those that the files
# were made with, only what is `decided` is compared. To try that on a processor with these:
#
#     NPY_DISABLE_CPU_FEATURES="AVX512_ICL X86_V4 X86_V3" python -m pytest tests/test_golden.py
TIED = ("search-7b", "search-two-kinds", "search-pins")
PROCESSOR = GOLDEN / "processor.txt"


def vector_instructions() -> str:
    """Those that NumPy uses here."""
    return " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])) + "\n"


def pinned(*names: str) -> bool:
    """Whether the packages have the versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return all(f"{name}=={version(name)}" in lines for name in names)


SAME_PICTURES = pinned("matplotlib", "pillow")  # with others they have other bytes


def plan(directory: Path, *arguments: str) -> Result:
    """Run a command in a directory. What it writes says by which command, as `sys.argv` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["plan", *arguments])
        result = CliRunner(env={"FORCE_COLOR": None}).invoke(main, arguments)
    assert result.exit_code == (2 if result.stderr.startswith("plan: ") else 0), result.output
    return result


# --- commands ---


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_always_said(name: str, tmp_path: Path, renew_golden: bool) -> None:
    if renew_golden:
        PROCESSOR.write_text(vector_instructions())
    (tmp_path / "out").mkdir()
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    (tmp_path / "golden").symlink_to(GOLDEN)
    result = plan(tmp_path, *COMMANDS[name].split())
    said = {"stdout.txt": result.stdout, "stderr.txt": result.stderr}
    found = {file: text.encode() for file, text in said.items() if text}
    found |= {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for file in found:
        if not file.endswith(".png"):
            found[file] = without_what_varies(found[file].decode()).encode()
    if renew_golden:
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        (GOLDEN / name).mkdir()
        for file, content in found.items():
            (GOLDEN / name / file).write_bytes(content)
    expected = {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir()}
    assert set(found) == set(expected)
    if name in TIED and vector_instructions() != PROCESSOR.read_text():
        ours, theirs = (json.loads(files["best.json"]) for files in (found, expected))
        assert_same(decided(ours), decided(theirs), "best.json")
        return
    for file, content in found.items():
        if file.endswith(".json"):
            assert_same(json.loads(content), json.loads(expected[file]), file)
        elif file.endswith(".png"):
            assert content == expected[file] or not SAME_PICTURES, file
        else:
            assert content.decode() == expected[file].decode(), file


def decided(plan: dict[str, Any]) -> dict[str, Any]:
    """Of a plan what the search decides for its step time: which roles are on which GPUs, the
    staleness, the step time and the proof. Layouts and the order of calls may be tied."""
    predicted = plan["predicted"]
    seconds = ("step_seconds", "step_seconds_p95", "lower_bound_seconds", "gap", "proof")
    return {
        **{key: plan[key] for key in ("workload", "cluster", "pools", "staleness")},
        "homes": {role: layout["pools"] for role, layout in plan["roles"].items()},
        "calls": sorted(item["call"] for item in plan["program"]),
        **{key: predicted[key] for key in seconds},
    }


def without_what_varies(text: str) -> str:
    """A text without seconds taken, the package's version, this checkout's place and the sign of 0.

    A difference of two equal times has the sign of its rounding, which is the processor's."""
    text = text.replace(str(ROOT / "profiles"), "profiles")
    text = re.sub(r'"search_seconds": [\d.e-]+', '"search_seconds": 0.0', text)
    text = re.sub(r'"version": "[^"]*"', '"version": ""', text)
    text = re.sub(r"(to evaluate, in) [\d.,]+ s\.", r"\1 0 s.", text)
    return re.sub(r"[+-](0\.0+)(?!\d)", r"±\1", text)


def assert_same(found: object, expected: object, where: str) -> None:
    """Equal, keys in the same order, but for the rounding of floats."""
    assert type(found) is type(expected), where
    if isinstance(found, float) and isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12), (where, found, expected)
    elif isinstance(found, dict) and isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in found.items():
            assert_same(value, expected[key], f"{where}: {key}")
    elif isinstance(found, list) and isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    else:
        assert found == expected, where


def test_every_golden_file_is_of_a_command() -> None:
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(COMMANDS)


# --- reports of studies ---


def files_of(root: Path, study: str) -> dict[str, bytes]:
    """The files of a study, by their paths under a root."""
    paths = (root / REPORTS / study).rglob("*")
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture(scope="module", params=STUDIES)
def reported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of a study after its report is made anew in a copy, and as they are committed.

    All that a report writes is taken out of the copy before, but for the notes of its page."""
    study, copy = request.param, tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / REPORTS / study, copy / REPORTS / study)
    shutil.copy(ROOT / REPORTS / f"{study}.toml", copy / REPORTS)
    for path in (copy / REPORTS / study).rglob("*"):
        if path.suffix == ".png" or path.stem == "results":
            path.unlink()
    page = copy / REPORTS / study / "README.md"
    _, heading, notes = page.read_text(encoding="utf-8").partition("\n## Notes\n")
    page.write_text(heading + notes, encoding="utf-8")
    assert plan(copy, "study", str(REPORTS / f"{study}.toml"), "--report").stderr == ""
    return files_of(copy, study), files_of(ROOT, study)


@pytest.mark.slow
def test_a_report_is_what_is_committed(
    reported: tuple[dict[str, bytes], dict[str, bytes]],
) -> None:
    found, expected = reported
    assert set(found) == set(expected)
    differing = {name for name in found if found[name] != expected[name]}
    assert {name for name in differing if not name.endswith(".png")} == set()


@pytest.mark.skipif(not SAME_PICTURES, reason="another matplotlib or pillow than constraints.txt")
@pytest.mark.slow
def test_the_pictures_of_a_report_are_what_is_committed(
    reported: tuple[dict[str, bytes], dict[str, bytes]],
) -> None:
    found, expected = reported
    pictures = [name for name in expected if name.endswith(".png")]
    assert pictures
    assert [name for name in pictures if found[name] != expected[name]] == []
