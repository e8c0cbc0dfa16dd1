"""Pages in a real browser: nothing is wrong in the console, a phone need not scroll sideways, both schemes are read."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml import examples, gallery, report
from ray_dfml.cli import tables
from ray_dfml.compare import compare
from ray_dfml.core.net import net
from ray_dfml.data.pool import Pool
from ray_dfml.doctor import page as pool_page
from ray_dfml.doctor.examine import examine
from tests import test_examples, test_gallery, test_report
from tests.doctor.conftest import IMAGE, WAY, put

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, of this machine or of playwright."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as play:
        try:
            started = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: install chromium, or run `playwright install chromium` ({str(error)[:80]})")
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run with all that a page can have, with long names, and one of a comparison."""
    root = tmp_path_factory.mktemp("pages")
    run = test_report.make(root / ("a-run-with-a-rather-long-name-" * 3), scores=[
        *test_report.SCORES, test_report.score("free", 60.0, shot=5), test_report.score("random", 50.0, shot=5),
    ])  # fmt: skip
    long = "omniglot/Anglo-Saxon_Futhorc_and_more_of_it/character_number_05"
    rng, found = np.random.default_rng(0), {}
    for r in range(12):
        both = [test_gallery.seen(f"omniglot-conv4-{i:04d}", f"{long}{i}", kind=kind, shape=(3, 32, 32))
                for kind in ("recovered", "asked") for i in range(6)]  # fmt: skip
        pixels = [rng.integers(0, 256, one.images.shape, np.uint8) for one in both]
        noise = [one._replace(images=x, said=(long,) * 4) for one, x in zip(both, pixels, strict=True)]
        found = gallery.taken(found, noise, r)
    (run / gallery.FILE).write_bytes(gallery.to_file(found))
    of = [test_examples.of_episodes(20, 5, wrong=True), test_examples.of_episodes(60, 20, wrong=True)]
    (run / examples.FILE).write_bytes(examples.to_file(of))
    (run / "ledger.jsonl").write_text('{"teacher": "a-service-with-a-long-name-0", "sent": 12345, "answered": 999}\n')
    test_report.edit(run / "status.json", notes=["a/very/long/path/" * 20], last_error="x" * 300)
    report.write(run)
    table = root / "runs.html"
    table.write_text(tables.as_html(compare([run])))
    (root / "pool.html").write_text(pool_page.page(examine(pool_of(root / "pool"))))
    return {"run": run / "report.html", "comparison": table, "pool": root / "pool.html"}


def pool_of(folder: Path) -> Pool:
    """Fourteen teachers with long names: untrained ones, of which two are alike, and one whose answers overflow."""
    pool, network = Pool.create(folder), net("conv4", IMAGE.shape, WAY)
    for i in range(14):
        theta = network.init(torch.Generator().manual_seed(min(i, 12))).numpy()
        stats = network.initial_stats().numpy()
        names = tuple(f"omniglot/Anglo-Saxon_Futhorc_and_more_of_it/character_{i % 9}{c}" for c in range(WAY))
        put(pool, f"a-teacher-with-a-rather-long-name-{i:04d}", theta * (1e30 if i == 5 else 1), stats, names)
    return pool


@pytest.mark.parametrize("name", ["run", "comparison", "pool"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_a_page_is_quiet_and_fits(browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], set()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.add(request.url.partition(":")[0]))
    page.goto(pages[name].as_uri())
    for summary in page.query_selector_all("summary"):
        summary.click()  # the tables of plots, and the settings
    assert said == []
    assert asked <= {"file", "data"}
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0 && one.alt)")
    assert page.evaluate(UNREADABLE) == []
    context.close()


UNREADABLE = """() => {
  const number = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => number(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!colour.startsWith("color") && (number(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = new Set();
  for (const one of document.querySelectorAll("p, li, dt, dd, td, th, h1, h2, h3, span, small, code, summary, text")) {
    if (!one.textContent.trim() || !one.getClientRects().length || one.closest(".heat")) continue;
    const style = getComputedStyle(one), ink = one.tagName === "text" ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(one))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.add(`${one.tagName} ${one.className} ${ink} on ${behind(one)}`);
  }
  return [...found];
}"""
"""Texts whose contrast is below 4.5 (WCAG 2.2, level AA)."""
