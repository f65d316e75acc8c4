"""The playground in a real browser, driven as a person drives it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    FloatRect,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)

from flashvl.data import synthetic
from flashvl.data.images import decode_image
from flashvl.engine import Engine, Request
from flashvl.model.loading import resolve_checkpoint
from flashvl.serve.playground import examples
from tests.support.images import base64_of, encode, noise
from tests.support.serving import Service, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"
)

DROP = """([data, name]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name, {type: "image/png"}));
    const drop = document.getElementById("choose");
    for (const kind of ["dragover", "drop"])
        drop.dispatchEvent(
            new DragEvent(kind, {dataTransfer: files, cancelable: true, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


PHONE = {"width": 390, "height": 844}


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The open page; an error in its console, or a request to another host, fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    context.grant_permissions(["clipboard-read", "clipboard-write", "camera"])
    page = context.new_page()
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        # The page shows a refusal to the user; the browser also writes it to its console.
        is_refusal = "(Bad Request)" in message.text or "(Unauthorized)" in message.text
        if message.type == "error" and not is_refusal:
            complaints.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((url, "data:", "blob:"))
            else complaints.append(request.url)
        ),
    )
    page.goto(url)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as page:
        yield page


@pytest.fixture(scope="module")
def picture() -> bytes:
    return encode(synthetic.sample("heldout", 0, 3, tasks=("caption",)).image())


def question(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Question")


def ask(page: Page, text: str) -> str:
    """Ask and return the answer."""
    answers = page.locator(".answer:has(.bar) .assistant")
    before = answers.count()
    question(page).fill(text)
    question(page).press("Enter")
    expect(page.locator(".bar")).to_have_count(before + 1, timeout=20_000)
    return answers.nth(before).text_content() or ""


def box(locator: Locator) -> FloatRect:
    found = locator.bounding_box()
    assert found is not None
    return found


def test_drop_ask_and_read_the_answer(page: Page, picture: bytes, engine: Engine) -> None:
    page.evaluate(DROP, [base64_of(picture), "scene.png"])
    expect(page.locator("#cut")).to_contain_text("1 tile (static)")
    expect(page.locator("#tiles rect.kept")).to_have_count(1)
    expect(page.locator("#legend-dropped")).to_be_hidden()
    answer = ask(page, "Describe the image.")

    request = Request(
        messages=[{"role": "user", "content": "<image>\nDescribe the image."}],
        images=[decode_image(picture)],
    )
    (expected,) = engine.generate([request])
    assert answer == expected.text
    assert f"{len(expected.token_ids)} tokens" in (page.locator("summary").text_content() or "")
    shares = re.findall(r"(\d+)%", page.locator(".bar").get_attribute("aria-label") or "")
    assert len(shares) == 3 and 99 <= sum(map(int, shares)) <= 101
    expect(page.locator(".phases")).to_be_hidden()
    page.locator("summary").click()
    expect(page.locator(".phases")).to_contain_text("first token")
    assert question(page).input_value() == ""

    # A second turn knows the picture of the first one; a new chat knows nothing of either.
    assert ask(page, "How many shapes are there?").isdigit()
    expect(page.locator(".user")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#image")).to_be_visible()


def test_paste(page: Page, picture: bytes) -> None:
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "x.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
        }""",
        base64_of(picture),
    )
    expect(page.locator("#cut")).to_contain_text("tokens")


def test_examples_are_asked_about_and_answered(page: Page) -> None:
    """A click and a key bring each example's answer, which is right."""
    for example in examples().values():
        page.get_by_label(f"Example: {example.name}", exact=True).click()
        expect(page.locator("#cut")).to_contain_text("tokens")
        expect(question(page)).to_have_value(example.questions[0])
        expect(page.locator("#chips button")).to_have_count(len(example.questions))
        expect(question(page)).to_be_focused()
        answer = ask(page, example.questions[0])
        assert answer == example.sample.turns[-1].answer, example.name
        page.get_by_role("button", name="Remove the picture").click()
        expect(page.locator(".turn")).to_have_count(0)


def test_the_camera(page: Page) -> None:
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the picture").click(timeout=10_000)
    expect(page.locator("#cut")).to_contain_text("tokens")
    assert (page.locator("#image").get_attribute("src") or "").startswith("data:image/jpeg")
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Cancel").click(timeout=10_000)
    expect(page.locator("#choose")).to_be_visible()


OPENED = """() => new Promise((done) => {
    // As soon as there is a stream, before its first frame.
    const video = document.getElementById("video");
    const wait = () => video.srcObject ? done() : setTimeout(wait, 0);
    document.getElementById("camera").click();
    wait();
})"""


def test_the_camera_is_cancelled_before_its_first_frame(page: Page) -> None:
    for _ in range(5):
        page.evaluate(f"({OPENED})().then(() => document.getElementById('no-camera').click())")
        expect(page.locator("#choose")).to_be_visible()
    # A picture cannot be taken before the camera shows one.
    is_disabled = page.evaluate(
        f"({OPENED})().then(() => document.getElementById('shoot').disabled)"
    )
    assert is_disabled
    expect(page.get_by_role("button", name="Take the picture")).to_be_enabled()


def test_every_camera_that_was_opened_is_closed(page: Page) -> None:
    page.evaluate("""() => {
        const devices = navigator.mediaDevices, open = devices.getUserMedia.bind(devices);
        window.streams = [];
        devices.getUserMedia = async (wish) => {
            const stream = await open(wish);
            streams.push(stream);
            return stream;
        };
    }""")
    page.evaluate("for (let time = 0; time < 3; time++) document.getElementById('camera').click()")
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator("#cut")).to_contain_text("tokens")
    page.wait_for_function("streams.length === 3")
    states = page.evaluate(
        "streams.flatMap((stream) => stream.getTracks().map((t) => t.readyState))"
    )
    assert states == ["ended"] * 3


def test_the_picture_chosen_last_is_the_one_shown(page: Page, picture: bytes) -> None:
    """The last chosen picture is shown, even if an earlier one takes longer or fails."""
    slow, broken = encode(noise(0, (1500, 1500))), b"no picture"
    for earlier in (slow, broken):
        page.evaluate(
            f"""([earlier, chosen]) => {{
                const drop = {DROP};
                drop([earlier, "earlier.png"]);
                drop([chosen, "chosen.png"]);
            }}""",
            [base64_of(each) for each in (earlier, picture)],
        )
        expect(page.locator("#cut")).to_contain_text("tokens")
        page.wait_for_timeout(500)
        shown = page.locator("#image").get_attribute("src") or ""
        assert shown.endswith(base64_of(picture))
        expect(page.locator("#picture-error")).to_be_hidden()
        page.get_by_role("button", name="Remove the picture").click()


def test_all_of_it_is_reached_by_keyboard_and_has_a_name(page: Page) -> None:
    page.get_by_label("Example: a sign").click()
    expect(page.locator("#cut")).to_contain_text("tokens")
    reached = []
    page.get_by_role("heading", name="tiny").click()  # from the page's beginning
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.dataset.copy"
                " || document.activeElement.textContent"
            )
        )
    order = ["card-link", "clear", "remove", "show-tiles", "log", "question", "file", "camera"]
    assert [each for each in reached if each in order][: len(order)] == order
    assert {"curl", "python", "ask"} <= set(reached)
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button, a, img, svg, video, dialog, ul")]
            .filter((e) => !e.closest("[aria-hidden]"))
            .filter((e) => !(e.labels?.length || e.textContent.trim() || e.alt !== undefined
                || e.ariaLabel || e.getAttribute("aria-labelledby")))
            .map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_nothing_is_sent_for_a_blank_question(page: Page) -> None:
    sent = []
    page.on("request", lambda request: sent.append(request.method))
    send = page.get_by_role("button", name="Ask", exact=True)
    for text in ("", "   ", " \n\t "):
        question(page).fill(text)
        expect(send).to_be_disabled()
        question(page).press("Enter")
    page.wait_for_timeout(300)
    assert "POST" not in sent
    expect(page.locator(".turn")).to_have_count(0)


def test_a_broken_file_leaves_no_picture(page: Page, picture: bytes, tmp_path: Path) -> None:
    whole, cut, text = (tmp_path / name for name in ("whole.png", "cut.png", "text.png"))
    whole.write_bytes(picture)
    cut.write_bytes(picture[:40])
    text.write_text("no picture")
    for broken in (cut, text):
        page.set_input_files("#file", whole)
        expect(page.locator("#image")).to_be_visible()
        page.set_input_files("#file", broken)
        expect(page.locator("#picture-error")).to_contain_text(f"{broken.name} is no picture")
        expect(page.locator("#image")).to_be_hidden()
        assert page.locator("#image").get_attribute("src") is None
        expect(page.locator("#choose")).to_be_visible()
    page.set_input_files("#file", whole)
    expect(page.locator("#picture-error")).to_be_hidden()


def test_what_is_too_long_is_said_and_can_be_mended(page: Page, tmp_path: Path) -> None:
    noisy = tmp_path / "noise.png"
    noisy.write_bytes(encode(noise(0)))
    page.set_input_files("#file", noisy)
    long = ("word " * 3000).strip()
    question(page).fill(long)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".turn.error")).to_contain_text("limit", timeout=20_000)
    expect(question(page)).to_have_value(long)
    expect(page.locator(".user")).to_have_count(0)


def test_an_answer_is_stopped(page: Page) -> None:
    def lengthen(route: Route) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": 900}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", lengthen)
    question(page).fill("Describe the image.")
    question(page).press("Enter")
    expect(page.locator(".assistant")).not_to_be_empty(timeout=20_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("summary")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    expect(question(page)).to_be_focused()
    page.unroute("**/v1/chat/completions")
    ask(page, "How many shapes are there?")


def test_the_request_is_copied_and_runs_elsewhere(page: Page, tmp_path: Path) -> None:
    """As a curl command and as Python: after a turn, and with the question in the box."""
    page.get_by_label("Example: a chart").click()
    expect(page.locator("#cut")).to_contain_text("tokens")
    ask(page, "Describe the image.")
    question(page).fill("Which bar is the shortest?")
    for kind, interpreter in (("curl", "bash"), ("Python", sys.executable)):
        page.get_by_role("button", name=kind).click()
        expect(page.locator("#said")).to_contain_text(kind)
        copied = page.evaluate("navigator.clipboard.readText()")
        file = tmp_path / kind
        file.write_text(copied)
        done = subprocess.run([interpreter, file], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        said = done.stdout.strip()
        if kind == "curl":
            said = json.loads(said)["choices"][0]["message"]["content"]
        assert said == "black"
    assert ask(page, "Which bar is the shortest?") == "black"


def test_on_a_phone_it_is_one_column_with_the_box_at_its_end(browser: Browser, url: str) -> None:
    with opened(browser, url, viewport=PHONE, is_mobile=True, has_touch=True) as page:
        page.get_by_label("Example: shapes").tap()
        expect(page.locator("#cut")).to_contain_text("tokens")
        for number in range(6):
            ask(page, "Describe the image.")
            form, picture = box(page.locator("#form")), box(page.locator("#picture"))
            last = box(page.locator(".answer").nth(number))
            assert 0 < PHONE["height"] - (form["y"] + form["height"]) < 40
            assert last["y"] > picture["y"] + picture["height"]
            assert last["y"] + last["height"] <= form["y"] + 1  # seen without scrolling
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == PHONE["width"]


def test_on_a_desktop_picture_and_conversation_are_side_by_side(page: Page) -> None:
    page.get_by_label("Example: shapes").click()
    expect(page.locator("#cut")).to_contain_text("tokens")
    ask(page, "Describe the image.")
    picture, answer, form = (box(page.locator(each)) for each in ("#picture", ".answer", "#form"))
    assert picture["x"] + picture["width"] < answer["x"]
    assert form["x"] == pytest.approx(answer["x"], abs=1)
    assert 0 < 800 - (form["y"] + form["height"]) < 40


def test_dark_light_and_still(browser: Browser, url: str) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        with opened(browser, url, color_scheme=scheme, reduced_motion="reduce") as page:
            papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            moving = page.evaluate(
                "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e))"
                ".filter((s) => s.transitionDuration !== '0s' || s.animationName !== 'none').length"
            )
            assert moving == 0
    assert len(papers) == 2


def test_the_page_is_closed_to_what_is_not_its_own(url: str) -> None:
    for path in ("/", "/playground/playground.js", "/playground/examples/0.jpg"):
        answer = requests.get(url + path, timeout=10)
        policy = answer.headers["Content-Security-Policy"]
        assert answer.status_code == 200 and "unsafe" not in policy and "*" not in policy
    for path in ("/playground/__init__.py", "/playground/examples/9.jpg"):
        assert requests.get(url + path, timeout=10).status_code == 404


@pytest.fixture(scope="module")
def closed(starts_ray: None) -> Iterator[Service]:
    with serving("--model=tiny-iss", FLASHVL_API_KEYS="right") as service:
        yield service


def test_a_key_is_asked_for_when_it_is_needed(browser: Browser, closed: Service) -> None:
    with opened(browser, closed.url) as page:
        expect(page.locator("#key-form")).to_be_hidden()
        question(page).fill("Describe the image.")
        question(page).press("Enter")
        key = page.get_by_label("This service asks for an API key")
        expect(key).to_be_focused()
        expect(question(page)).to_have_value("Describe the image.")
        key.fill("wrong")
        key.press("Enter")
        key = page.get_by_label("does not take this key")
        expect(key).to_be_focused()
        key.fill("right")
        key.press("Enter")  # and the question is asked again
        expect(page.locator(".bar")).to_have_count(1, timeout=20_000)
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator(".user")).to_have_count(1)

        page.get_by_role("link", name="Model card").click()
        expect(page.locator("#card")).to_be_visible()
        card = (resolve_checkpoint("tiny-iss") / "README.md").read_text()
        assert page.locator("#card pre").text_content() == card
        page.keyboard.press("Escape")
        expect(page.locator("#card")).to_be_hidden()


def test_kept_patches_and_dropped_overlap_can_be_told_apart(
    browser: Browser, closed: Service
) -> None:
    with opened(browser, closed.url) as page:
        page.get_by_label("Example: a chart").click()
        key = page.get_by_label("This service asks for an API key")
        expect(key).to_be_focused()
        key.fill("right")
        key.press("Enter")
        expect(page.locator("#cut")).to_contain_text("5 tiles with the overview (iss), 80 tokens")
        expect(page.locator("#legend-kept")).to_be_visible()
        expect(page.locator("#legend-dropped")).to_be_visible()
        image = box(page.locator("#image"))
        kept = [box(each) for each in page.locator("#tiles rect.kept").all()]
        # The kept parts lie side by side, and are the picture.
        assert len(kept) == 4
        area = sum(each["width"] * each["height"] for each in kept)
        assert area == pytest.approx(image["width"] * image["height"], rel=0.05)
        for place in ((0.25, 0.75), (0.75, 0.25)):
            page.mouse.move(
                image["x"] + place[0] * image["width"], image["y"] + place[1] * image["height"]
            )
            shown = page.locator("#tiles g.inner:visible")
            expect(shown).to_have_count(1)
            middle = box(shown)
            assert middle["x"] + middle["width"] / 2 == pytest.approx(
                image["x"] + place[0] * image["width"], abs=3
            )
            assert middle["width"] == pytest.approx(image["width"], rel=0.05)  # tile and overlap
        page.get_by_label("Tiles", exact=True).uncheck()
        expect(page.locator("#tiles")).to_be_hidden()


def test_pictures_of_it(browser: Browser, url: str) -> None:
    """Screenshots for people and for the README, if FLASHVL_SCREENSHOTS names a folder."""
    folder = os.environ.get("FLASHVL_SCREENSHOTS")
    if folder is None:
        pytest.skip("FLASHVL_SCREENSHOTS names no folder")
    for name, size in (("desktop", {"width": 1280, "height": 800}), ("phone", PHONE)):
        for scheme in ("light", "dark"):
            with opened(browser, url, viewport=size, color_scheme=scheme) as page:
                page.screenshot(path=Path(folder) / f"{name}-{scheme}-empty.png")
                page.get_by_label("Example: a chart").click()
                expect(page.locator("#cut")).to_contain_text("tokens")
                ask(page, "Describe the image.")
                ask(page, "Which bar is the shortest?")
                page.locator("summary").last.click()
                page.screenshot(path=Path(folder) / f"{name}-{scheme}.png")
