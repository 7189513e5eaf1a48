"""The report in a real browser, without a network: on a desk's screen and on a telephone's."""

import shutil

import pytest
from comparisons import ARMS, make_comparison

from matu_jax.comparison import report

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

DRAWN = """() => [...document.querySelectorAll("img, svg")].map(each => {
  const box = each.getBoundingClientRect();
  return {image: each.tagName == "IMG" ? each.complete && each.naturalWidth > 0 : true,
          area: box.width * box.height, right: box.right};
})"""
FONTS = """() => [...document.querySelectorAll("p, li, td, th, figcaption, summary, pre")]
  .filter(each => each.textContent.trim())
  .map(each => parseFloat(getComputedStyle(each).fontSize))"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on the PATH")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[8, 30], ids=["8 tasks", "30 tasks"])
def page_file(request, tmp_path_factory):
    comparison = make_comparison(ARMS, request.param)
    comparison["settings"][1]["missing"] = [{"label": "matu", "seed": 2}]
    return report.write(comparison, tmp_path_factory.mktemp("report"))[0]


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
def test_report_can_be_read(browser, page_file, width, height):
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    page = context.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri(), wait_until="load")
    assert page.title() == "MaTU and its rivals on eight tasks"

    figures = page.evaluate(DRAWN)
    assert len(figures) == page.locator("figure").count() == 8
    for figure in figures:
        assert figure["image"]
        assert figure["area"] > 200 * 150
        assert figure["right"] <= width

    for folded in (True, False):
        if not folded:
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        scroll = page.evaluate("document.documentElement.scrollWidth")
        assert scroll <= width, f"the page is {scroll} wide, folded: {folded}"
        assert min(page.evaluate(FONTS)) >= 14

    assert page.locator(".notice").is_visible()
    for link in page.locator("nav a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1
    outside = [url[:80] for url in requests if not url.startswith(("file:", "data:"))]
    assert not outside
    assert [url for url in requests if url.startswith("file:")] == [page_file.as_uri()]
    assert not problems
    context.close()
