"""The page of a plan: it has what it promises, and fetches nothing."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import make_workload, split
from processes import PATIENCE

from planner.cli import main
from planner.predict.forecast import forecast, predict
from planner.report.page import as_shown
from planner.report.tables import plain_table, seconds

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Outline(HTMLParser):
    """What is asked for elsewhere, the titles, and tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "action") and v[:1] != "#"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v[:1] != "#"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data.strip())


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    plan = split(make_workload())
    plan = plan.changed(predicted=predict(plan))
    plan.write(tmp_path / "plan.json")
    ran = tmp_path / "run"
    ran.mkdir()
    plan.write(ran / "plan.json")
    forecast(plan, 4).changed(source="measured").write(ran / "timeline.json")
    metrics = [{"step": n, "score": n / 10, "seconds": 2.0, "kl": None} for n in range(4)]
    text = "\n".join(map(json.dumps, metrics))
    (ran / "metrics.jsonl").write_text(text + '\n{"step": 5, "sc')
    sample = {
        "step": 3, "evaluation": None, "row": 1, "prompt": "2 + 2 <b>", "response": "four",
        "answer": "4", "scores": {"score": 1.0}, "response_tokens": 1, "truncated": False,
        "weights_version": 3, "staleness": 0, "where": None,
    }  # fmt: skip
    (ran / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    assert found.open == []
    return found


def test_the_page_of_a_plan(written: Path) -> None:
    result = run("report", written / "plan.json", "--out", written / "page.html")
    assert result.exit_code == 0, result.output
    page = (written / "page.html").read_text()
    found = outline(page)
    assert found.fetched == []
    assert {"Where everything runs", "What binds", "Where the figures come from"} <= {*found.titles}
    plan = split(make_workload())
    assert f"A step takes {seconds(predict(plan).step_seconds)} s" in page
    assert page.count('class="gpu"') == len(plan.cluster.gpus)
    assert all(f"<td>{call}</td>" in page for call in plan.dataflow.steady.names)


def test_the_page_of_a_run(written: Path) -> None:
    command = ("--run", written / "run", "--out", written / "page.html")
    assert run("report", written / "plan.json", *command).exit_code == 0
    page = (written / "page.html").read_text()
    assert {"Predicted and measured", "How the run went", "What the model said last"} <= {
        *outline(page).titles
    }
    assert "2 + 2 &lt;b&gt;" in page and "2 + 2 <b>" not in page
    assert page.count("<svg") == 2
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clips) == len({*clips})


@pytest.mark.slow
def test_what_is_asked_for_beside(written: Path) -> None:
    asked = ("--for", "verl", "--what-if", "--pareto", "1,2")
    result = run("report", written / "plan.json", *asked, "--out", written / "page.html")
    assert result.exit_code == 0, result.output
    page = (written / "page.html").read_text()
    assert {"What would be faster", "What if", "What more GPUs buy"} <= {*outline(page).titles}
    assert "the best for verl" in page and "1 → 2 GPUs" in page


def test_mistakes_are_one_line(written: Path) -> None:
    for arguments in (
        ("missing.json", "--out", written / "p.html"),
        (written / "plan.json", "--out", written / "p.txt"),
        (written / "plan.json", "--run", written / "nowhere", "--out", written / "p.html"),
    ):
        result = run("report", *arguments)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert not [*written.glob("p.*")]


def test_a_table_of_the_console_becomes_one_of_the_page() -> None:
    table = plain_table()
    table.add_column("[bold]name[/bold]")
    table.add_column("s", justify="right")
    table.add_row("[red]a[/red]", "1.0")
    shown = as_shown(table)
    assert [column["title"] for column in shown.columns] == ["name", "s"]
    assert [column["number"] for column in shown.columns] == [False, True]
    assert shown.rows == (("a", "1.0"),)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it_and_asks_for_nothing(written: Path, width: int) -> None:
    page = written / "page.html"
    assert run("report", written / "plan.json", "--out", page).exit_code == 0
    counting = "<script>document.title = performance.getEntriesByType('resource').length</script>"
    page.write_text(page.read_text().replace("</body>", counting + "</body>"))
    picture = written / "page.png"
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900")
    done = subprocess.run(
        ["chromium", *options, f"--screenshot={picture}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=written,
    )
    assert done.returncode == 0, done.stderr
    assert "<svg" in done.stdout
    assert "<title>0</title>" in done.stdout
    assert picture.stat().st_size > 20_000
