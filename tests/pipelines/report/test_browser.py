"""The report in a real browser, headless Chromium, as wide as a desktop and as a phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdata.pipelines.report.report import write_report
from tests.browser import needs_browser, result_of
from tests.pipelines.report.test_report import make_run

WIDTHS = {"desktop": 1280, "phone": 390}
# Measured in the page itself: the report has no script, so the frame around it asks. A frame of 390 pixels is a phone
# also for media queries; Chromium's own window is never narrower than 500.
MEASURE = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const shown = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
  const place = q => { const b = page.querySelector(q).getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const texts = [...page.querySelectorAll("p,li,td,th,b,span,h1,h2,h3,h4,pre,figcaption")].filter(shown);
  const result = {
    width: page.documentElement.clientWidth,
    scroll_width: page.documentElement.scrollWidth,
    headline: place(".headline"),
    short: place("table.short"),
    short_cells: [...page.querySelectorAll("table.short td")].map(e => e.getBoundingClientRect().right),
    smallest_font: Math.min(...texts.map(e => parseFloat(view.getComputedStyle(e).fontSize))),
    figures: [...page.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect().height),
    scripts: page.scripts.length,
    loads: view.performance.getEntriesByType("resource").map(e => e.name),
    text: page.body.innerText,
  };
  const output = document.createElement("pre");
  output.id = "result";
  output.textContent = JSON.stringify(result);
  document.body.append(output);
};
frame.srcdoc = document.querySelector("template").innerHTML;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("browser") / "run"))


def measure(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """Open the page in a frame of this width; return what the browser measured."""
    source = json.dumps(page.read_text("utf-8")).replace("</", "<\\/")
    script = MEASURE.replace('document.querySelector("template").innerHTML', source)
    style = f"border:0;width:{width}px;height:900px"
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f'<!doctype html><iframe style="{style}"></iframe><script>{script}</script>', encoding="utf-8")
    measured = result_of(wrapper.as_uri(), folder)
    assert measured["width"] == width
    return measured


@needs_browser
@pytest.mark.parametrize("device", WIDTHS)
def test_report_in_a_browser(page: Path, device: str, tmp_path: Path) -> None:
    width = WIDTHS[device]
    measured = measure(page, width, tmp_path)
    assert measured["scroll_width"] <= width, "the page itself must not scroll sideways; tables may, in their boxes"
    left, top, right, bottom = measured["headline"]
    assert min(left, top) >= 0 and right <= width and bottom <= 500, "the verdict stands on the first screen"
    assert measured["short"][3] <= 1100, "the numbers behind the verdict follow it at once"
    assert max(measured["short_cells"]) <= width, "the short table fits without scrolling"
    assert measured["smallest_font"] >= 12
    assert len(measured["figures"]) == 6 and min(measured["figures"]) > 80
    assert measured["scripts"] == 0 and measured["loads"] == []
    for words in (
        "Distillation helped",
        "Three small language models",
        "Loss on unseen text, by domain",
        "Time and energy",
    ):
        assert words in measured["text"]
