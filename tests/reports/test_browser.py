"""Reports in a real browser: no overflow at any width, no barrier that axe-core knows, zoom by mouse and keyboard.

They need Chromium (a Debian package), playwright and axe-core. `.ci/run` installs the first,
`make browsertools` the others. Where one is missing, these tests are skipped, and the reason names it.
"""

import os
import shutil
from pathlib import Path

import pytest

from eclipse_ray.reports.page import write_report
from tests.reports.material import write_folders

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; see make browser")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(os.environ.get("AXE_CORE", ".venv/node_modules/axe-core/axe.min.js"))
WIDTHS = (360, 820, 1280)
SCHEMES = ("light", "dark")

KINDS = ("demo", "matrix", "evaluate", "sweep", "audit", "train")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; see make browser"),
    pytest.mark.skipif(not AXE.exists(), reason=f"axe-core is not at {AXE} (or $AXE_CORE); see make browser"),
]


@pytest.fixture(scope="module")
def pages(world, tmp_path_factory) -> dict[str, str]:
    """The page of a folder of each kind that has a layout of its own, by address."""
    folders = write_folders(tmp_path_factory.mktemp("browser"), world)
    return {kind: Path(write_report(str(folders[kind])).report).as_uri() for kind in KINDS}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def open_page(browser, address: str, width: int, scheme: str, script: bool = True):
    """Open a page; a request to anywhere fails the test."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        bypass_csp=script,
        java_script_enabled=script,
    )
    page = context.new_page()
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: pytest.fail(f"the script failed: {error}"))
    page.goto(address)
    return page


def no_barrier(page) -> None:
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    assert found == [], [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]


@pytest.mark.parametrize("kind", KINDS)
def test_no_overflow_and_no_barrier_at_any_width_and_in_both_schemes(kind, browser, pages):
    for width in WIDTHS:
        for scheme in SCHEMES:
            page = open_page(browser, pages[kind], width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            no_barrier(page)
            assert all(url.startswith(("file:", "data:")) for url in page.asked)
            page.context.close()


def test_an_image_is_enlarged_and_left_again_by_keyboard_alone(browser, pages):
    page = open_page(browser, pages["demo"], 820, "light")
    page.locator("a.cell").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open]").get_attribute("id") == "image-1"
    no_barrier(page)
    page.keyboard.press("ArrowRight")
    assert page.locator("dialog[open]").get_attribute("id") == "image-2"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#image-1"
    page.context.close()


def test_clicking_through_every_link_of_the_contents_and_every_image(browser, pages):
    page = open_page(browser, pages["demo"], 360, "dark")
    for link in page.locator("nav a").all():
        link.click()
        assert page.locator(link.get_attribute("href")).is_visible()
    cells = page.locator(".row").first.locator("a.cell")
    for index in range(cells.count()):
        cells.nth(index).click()
        dialog = page.locator("dialog[open]")
        assert dialog.locator("img").count() == 6
        assert dialog.evaluate("d => d.scrollWidth <= d.clientWidth")
        dialog.locator("[data-close]").click()
    page.locator("summary").last.click()
    page.context.close()


def test_the_slider_moves_by_keyboard_and_changes_what_is_seen(browser, pages):
    page = open_page(browser, pages["demo"], 360, "dark")
    slider = page.locator("input[type=range]").first
    image = page.locator(".both").first
    slider.focus()
    pictures = []
    for key, value, said in (("Home", "0", "100 % after"), ("End", "100", "0 % after")):
        page.keyboard.press(key)
        assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == (value, said)
        pictures.append(image.screenshot())
    assert pictures[0] != pictures[1]
    page.context.close()


def test_the_page_works_without_its_script(browser, pages):
    page = open_page(browser, pages["demo"], 820, "light", script=False)
    page.locator("a.cell").first.click()
    assert page.locator("#image-1").is_visible()
    page.locator("#image-1 [data-close]").click()
    assert not page.locator("#image-1").is_visible()
    one, other = (page.locator(".both").first.locator("img").nth(place).bounding_box() for place in (0, 1))
    assert one["x"] + one["width"] <= other["x"], "before and after stand side by side"
    page.context.close()


def test_the_policy_lets_the_page_s_own_script_and_style_run(browser, pages):
    context = browser.new_context(viewport={"width": 820, "height": 800})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(pages["demo"])
    page.locator("a.cell").first.click()
    assert page.locator("dialog[open]").count() == 1
    assert page.evaluate("getComputedStyle(document.querySelector('.row')).display") == "grid"
    assert said == []
    context.close()
