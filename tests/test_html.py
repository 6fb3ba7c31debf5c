"""The report as a page, in a real browser; and as Markdown, a difference, and data read back."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from graphfuse.reporting import Report, Site

EVIL = "<script>document.title = 'escaped'</script>"
NORM = Site(
    pattern="rms_norm",
    status="rewritten",
    variant="weight, bfloat16",
    module="model.layers.0.norm",
    module_class="RMSNorm",
    source="/lib/modeling.py:62",
    covers={"rms_norm": 1},
    graph="0/0",
    formula="x · (mean(x²) + 1e-06)^(-1/2) · w",
    kernel="graphfuse::rms_norm",
    kernel_reason="one pass",
    frees="activations",
    saved_bytes=3 << 20,
    saved="3145728",
    exact_error=1e-16,
    region_error=2e-3,
    replacement_error=1e-3,
    before="a = x.pow(2)\nb = a.mean(-1)",
    after="y = graphfuse.rms_norm(x)",
)
HEAD = Site(
    "linear_cross_entropy", "refused", source="loss.py:3", reason=f"logits: {EVIL}", hint="read | none", graph="0/0"
)
REPORT = Report([*(replace(NORM, module=f"model.layers.{k}.norm") for k in range(4)), HEAD], [f"note {EVIL}"])
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, tmp_path, *options):
    """The document after a browser has read it."""
    path = tmp_path / "report.html"
    path.write_text(page)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", *options]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measured(width):
    """The page in a frame of this width, which says in its title what is visible and whether anything sticks out."""
    script = """
    <script>
    const seen = () => [...document.querySelectorAll('.gf-site')].filter(e => e.offsetParent).length;
    const told = [];
    for (const name of ['all', 'rewritten', 'refused']) {
      document.querySelector(`[value=${name}]`).click();
      told.push(seen() + '/' + [...document.querySelectorAll('.gf-module')].filter(e => e.offsetParent).length);
    }
    document.querySelector('[value=all]').click();
    document.querySelectorAll('details').forEach(e => { e.open = true; });
    const panes = [...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect());
    told.push(panes[0].top === panes[1].top ? 'beside' : 'below');
    told.push(document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'sticks out');
    (window.parent || window).document.title = told.join(' ');
    </script>
    """
    inner = REPORT.to_html().replace("</body>", script + "</body>").replace("&", "&amp;").replace('"', "&quot;")
    return f'<!doctype html><title>none</title><iframe width="{width}" height="900" srcdoc="{inner}"></iframe>'


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize(("width", "panes"), [(1280, "beside"), (400, "below")])
def test_works_in_a_browser(width, panes, tmp_path):
    """Filters by status, puts both graphs side by side where there is room, fits, and runs nothing it was given."""
    document = browse(measured(width), tmp_path, "--dump-dom")
    title = re.search("<title>(.*?)</title>", document)[1]
    assert title == f"2/1 1/1 1/0 {panes} fits"


def test_is_one_file_without_network_or_scripts():
    page = REPORT.to_html()
    assert not re.search(r"https?:|<script|src=|@import|url\(", page.replace("&lt;script", ""))
    assert page.lstrip().startswith("<!doctype html>")
    assert page.count("&lt;script&gt;") == 3  # in the line of the site, in its facts, and in the note


def test_shows_itself_in_a_notebook_without_a_page_around_it():
    fragment = REPORT._repr_html_()
    assert "<html" not in fragment
    assert "layers.{0-3}.norm" in fragment
    style = fragment.split("</style>")[0].split("<style>")[1]
    selectors = re.findall(r"^\s*([^\s@}{][^{}]*)\{", style, re.MULTILINE)
    assert all(part.strip().startswith(".graphfuse") for s in selectors for part in s.split(",\n"))


def test_writes_the_page(tmp_path):
    assert REPORT.to_html(tmp_path / "r.html") == (tmp_path / "r.html").read_text(encoding="utf-8")


def test_writes_markdown_in_which_nothing_is_markup():
    text = REPORT.to_markdown()
    assert "| rms_norm | `model.layers.{0-3}.norm` | 4 | rewritten | `x · (mean(x²) + 1e-06)^(-1/2) · w` |" in text
    assert "<script" not in text.replace("\\<script", "")
    assert r"read \| none" in text
    assert "```\na = x.pow(2)\nb = a.mean(-1)\n```" in text


def test_prints_all_it_knows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = REPORT.to_text(details=True)
    assert "rms_norm × 4  rewritten  model.layers.{0-3}.norm" in text
    assert "3.0 MiB of activations each, 12.0 MiB in all" in text
    assert "the same function: 1.0e-16 apart in float64; error 1.0e-03, of the code before 2.0e-03" in text
    assert "kept less than in eager torch: 12.0 MiB of activations" in text
    assert "to match, linear_cross_entropy at loss.py:3: read | none" in REPORT.to_text()


def test_says_what_changed():
    fixed = replace(HEAD, status="rewritten", reason="", hint="", variant="mean")
    lost = replace(NORM, status="refused", reason="dim: expected the last one, got 1")
    other = replace(NORM, module="model.layers.1.norm", variant="no weight", formula="x")
    now = Report([lost, other, *REPORT.sites[2:4], fixed])
    change = REPORT.diff(now)
    assert (change.gained, change.lost, change.changed) == ((fixed,), (lost,), ((REPORT.sites[1], other),))
    lines = str(change).splitlines()
    assert lines[:2] == ["+ linear_cross_entropy (root): mean", f"- rms_norm model.layers.0.norm: {lost.reason}"]
    assert lines[2].startswith("~ rms_norm model.layers.1.norm: weight, bfloat16; x · ")
    assert lines[3] == "memory saved: 3.0 MiB less"
    assert not REPORT.diff(REPORT)
    assert str(REPORT.diff(REPORT)) == "graphfuse: no change"


def test_reads_back_what_it_wrote(tmp_path):
    REPORT.to_json(tmp_path / "r.json")
    assert Report.from_json(tmp_path / "r.json") == REPORT
    with pytest.raises(ValueError, match="schema_version: expected 1, got 99"):
        Report.from_dict({"schema_version": 99})
