"""The page in a real browser: every tab, every task with the mouse, a phone's width, mistakes as text.

Skipped without Playwright (`pip install playwright`) and a Chromium (`apt install chromium`).
"""

import shutil
import threading
import time

import pytest
from picture_files import png
from tiny_runs import noise

from ldm.serve.runs import Runs
from ldm.serve.server import Server, Site

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
TABS = ("Curves", "Images", "Data", "Figures", "Config", "Samples")


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a Chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def server(logs, tasks, studio):
    made = Server("127.0.0.1", 0, Site(Runs([logs, next(iter(tasks.values())).parent]), studio))
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport=DESK)
    page.set_default_timeout(20_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector("#plots figure")
    yield page
    page.close()
    assert not page.errors


def until(page, expression):
    """Wait for a JavaScript expression to be true; Playwright's own way is refused by the page's security policy."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(30)


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def choose(page, run):
    """Open the samples of a run, and wait for its form."""
    open_tab(page, "Samples")
    page.select_option("#samples-of", label=run)
    until(page, "!document.getElementById('state').textContent && !document.querySelector('form.empty')")


def drawn(page, count=1):
    """Draw, and return the card of the order when its images are there."""
    page.fill("[name=count]", str(count))
    page.fill("[name=steps]", "2")
    before = page.locator("#drawn article").count()
    page.get_by_role("button", name="Draw").click()
    until(page, f"document.querySelectorAll('#drawn article').length > {before}")
    card = page.locator("#drawn article").first
    card.locator("img[alt^=sample]").nth(count - 1).wait_for()
    assert card.locator("output").inner_text() == "done"
    return card


def drag(page, *points):
    """Move the pressed mouse over the canvas, through points in fractions of it."""
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def test_every_tab(page):
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 2000
    page.get_by_role("checkbox", name="2-class").check()
    until(page, "document.querySelectorAll('#plots figure polyline').length >= 4")
    page.locator("#plots svg").first.hover()
    caption = page.locator("#plots figcaption").first.inner_text()
    assert caption.startswith("train/loss: ") and "3-text 0.25 at 2" in caption and "2-class" in caption
    open_tab(page, "Images")
    page.locator("#grids img").first.wait_for()
    page.locator("#step").fill("0")
    until(page, "document.getElementById('shown-step').textContent === '5'")
    open_tab(page, "Data")
    page.select_option("#data-of", label="2-class")
    page.locator("#items .box").first.wait_for()
    assert page.locator("#items figure").count() == 12
    page.get_by_role("checkbox", name="what the first stage leaves").check()
    page.get_by_alt_text("decoded").first.wait_for()
    page.get_by_role("button", name="Later").click()
    until(page, "document.querySelectorAll('#items figure').length === 2")
    open_tab(page, "Figures")
    page.get_by_text("No evaluation lies in these run folders").wait_for()
    open_tab(page, "Config")
    page.select_option("#config-other", label="2-class")
    page.locator("#config-text .added").first.wait_for()


def test_texts_and_classes(page):
    choose(page, "3-text")
    page.fill("[name=prompt]", "a red circle")
    assert "a red circle" in drawn(page, count=2).inner_text()
    page.fill("[name=prompt]", "x" * 10_000)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("10000 characters; at most 1000 are taken").wait_for()
    choose(page, "2-class")
    page.select_option("[name=label]", label="3: yellow circle")
    assert "class 3" in drawn(page).inner_text()
    page.reload()
    page.wait_for_selector("#plots figure")
    open_tab(page, "Samples")
    assert page.locator("#drawn article").count() == 2  # orders outlive the page


def test_boxes_with_the_mouse(page):
    choose(page, "layout")
    drag(page, (0.1, 0.1), (0.5, 0.6))
    page.select_option("[name=label]", "3")
    drag(page, (0.5, 0.5), (0.9, 0.9))
    assert page.locator("#boxes button").all_inner_texts() == ["red circle ×", "yellow circle ×"]
    assert drawn(page).locator("img.source").count() == 1
    page.locator("#boxes button").first.click()
    assert page.locator("#boxes button").count() == 1
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("layout: is no list of objects").wait_for()


def test_a_map_is_painted(page):
    choose(page, "semantic")
    page.select_option("[name=label]", "2")
    drag(page, (0.2, 0.2), (0.8, 0.2), (0.8, 0.8))
    painted = drawn(page).locator("img.source").screenshot()
    page.fill("#item", "3")
    page.get_by_role("button", name="Take").click()
    page.wait_for_timeout(300)
    assert drawn(page).locator("img.source").screenshot() != painted


def test_a_hole_is_painted_into_an_image_of_the_data(page):
    choose(page, "inpaint")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("this model fills holes").wait_for()
    page.get_by_role("button", name="Take").click()
    page.wait_for_timeout(300)
    drag(page, (0.3, 0.3), (0.6, 0.6))
    assert drawn(page).locator("img.source").count() == 1


def test_images_that_are_sent(page):
    choose(page, "superres")
    page.set_input_files("[name=image]", {"name": "a.png", "mimeType": "image/png", "buffer": png(noise(16, 12))})
    page.wait_for_timeout(300)
    image = drawn(page).locator("img[alt^=sample]").first
    assert image.evaluate("image => image.decode().then(() => image.naturalHeight)") == 32
    page.set_input_files("[name=image]", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("the file is no image that can be read here").wait_for()
    page.get_by_role("button", name="Take").click()
    page.wait_for_timeout(300)
    drawn(page)
    choose(page, "none")
    page.set_input_files("[name=image]", {"name": "a.png", "mimeType": "image/png", "buffer": png(noise(40, 30))})
    page.wait_for_timeout(300)
    assert drawn(page).locator("img.source").count() == 1


def test_conditions_of_an_item(page):
    choose(page, "retrieval")
    page.fill("#item", "2")
    drawn(page)


def test_a_run_that_is_broken_is_told_and_the_others_go_on(page):
    assert "0-broken" in page.locator("#runs .broken").inner_text()
    choose(page, "3-text")
    page.select_option("#samples-of", label="autoencoder")
    page.get_by_text("samples need a LatentDiffusion").wait_for()
    assert not page.locator("#order").is_visible()
    choose(page, "1-none")
    drawn(page)


def test_a_phone(page):
    page.set_viewport_size(PHONE)
    for name in TABS:
        open_tab(page, name)
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
    for run in ("layout", "semantic", "inpaint", "3-text"):
        choose(page, run)
        page.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], run
        page.locator("summary").click()


def test_two_browsers_at_once_and_one_cancels(browser, server, page):
    other = browser.new_page()
    other.goto(server.address)
    for each in (page, other):
        choose(each, "1-none")
    page.fill("[name=steps]", "20")
    page.fill("[name=count]", "16")
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("button", name="Cancel").click()
    drawn(other)
    page.locator("#drawn article output", has_text="cancelled").wait_for()
    assert other.locator("#drawn article").count() == 1
    other.close()


def test_a_server_that_is_stopped_in_the_middle(page, studio):
    choose(page, "3-text")
    page.fill("[name=prompt]", "a red circle")
    page.fill("[name=steps]", "20")
    page.fill("[name=count]", "16")
    page.get_by_role("button", name="Draw").click()
    page.locator("#drawn article").wait_for()
    studio.stop()
    page.context.set_offline(True)  # connections that are open outlive the thread of a server, unlike its process
    page.get_by_text("The server does not answer; is it still running?").first.wait_for()
    assert page.input_value("[name=prompt]") == "a red circle"
    page.context.set_offline(False)
