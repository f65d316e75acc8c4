"""The playground in a real browser, driven as a person drives it."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from flashvl.data import synthetic
from flashvl.data.images import decode_image
from flashvl.engine import Engine, Request
from tests.serve.conftest import encode, noise

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"
)

DROP = """([data, name]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name, {type: "image/png"}));
    const drop = document.getElementById("drop");
    for (const kind of ["dragover", "drop"])
        drop.dispatchEvent(new DragEvent(kind, {dataTransfer: files, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The open page; what it complains of in its console fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 760})
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        # A refusal is told to the user, and by the browser to its console.
        if message.type == "error" and "(Bad Request)" not in message.text:
            complaints.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def picture() -> bytes:
    return encode(synthetic.sample("heldout", 0, 3, tasks=("caption",)).image())


def test_drop_ask_and_read_the_answer(page: Page, picture: bytes) -> None:
    page.evaluate(DROP, [base64.b64encode(picture).decode(), "scene.png"])
    expect(page.locator("#cut")).to_contain_text("1 tile (static)")
    assert page.locator("#tiles rect").count() == 1
    page.get_by_role("button", name="Ask").click()
    answer = page.locator(".assistant")
    expect(answer).to_contain_text("green square", timeout=20_000)

    request = Request(
        messages=[{"role": "user", "content": "<image>\nDescribe the image."}],
        images=[decode_image(picture)],
    )
    (expected,) = Engine.from_pretrained("tiny", "float32").generate([request])
    expect(page.locator("#completion_tokens")).to_have_text(str(len(expected.token_ids)))
    assert answer.text_content() == expected.text
    for number in ("queue_ms", "ttft_ms", "tpot_ms", "total_ms"):
        expect(page.locator(f"#{number}")).to_contain_text("ms")
    expect(page.locator("#queue")).to_contain_text("waiting")
    if folder := os.environ.get("FLASHVL_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "playground.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=Path(folder) / "playground-dark.png")

    # A second turn, by the keyboard alone.
    question = page.get_by_label("Question")
    question.fill("How many shapes are there?")
    question.press("Enter")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator(".assistant").nth(1)).not_to_be_empty(timeout=20_000)
    page.get_by_role("button", name="Start over").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_the_camera(page: Page) -> None:
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the picture").click(timeout=10_000)
    expect(page.locator("#cut")).to_contain_text("tokens")
    assert page.locator("#image").get_attribute("src").startswith("data:image/jpeg")


def test_all_of_it_is_reached_by_keyboard_and_has_a_name(page: Page) -> None:
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"file", "camera", "show-tiles", "question", "ask", "clear"} <= reached
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button, img, svg, video")]
            .filter((e) => !(e.labels?.length || e.textContent.trim() || e.alt || e.ariaLabel))
            .map((e) => e.id)"""
    )
    assert unnamed == []


def test_what_goes_wrong_is_said(page: Page, tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("no picture")
    page.set_input_files("#file", text)
    expect(page.locator(".error")).to_have_text("That is no picture.")
    noisy = tmp_path / "noise.png"
    noisy.write_bytes(encode(noise(0)))
    page.set_input_files("#file", noisy)
    page.get_by_label("Question").fill("word " * 3000)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".error")).to_contain_text("limit", timeout=20_000)
