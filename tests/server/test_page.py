"""The page in a browser, against a running server. ``live_server`` is its address.

What depends on the model alone (a tool call, a refused request) is answered in the server's place by ``canned``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP, PHONE = (1280, 800), (360, 740)
PATIENCE = 60_000  # milliseconds a small model may take for an answer

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, live_server: str) -> Iterator[Open]:
    """Opens the page afresh. No test may end with an error in the page or with a request to elsewhere."""
    contexts, errors, requests = [], [], []

    def open_page(size: tuple[int, int] = DESKTOP, theme: Any = "light", most: int | None = 40) -> Page:
        width, height = size
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(20_000)
        page.goto(live_server)
        if most is not None:
            setting(page, "Max tokens", most)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {urlsplit(url).netloc for url in requests} == {urlsplit(live_server).netloc}
    assert [error for error in errors if "status of 4" not in error] == []  # a refusal is a line of the console too


def setting(page: Page, label: str, value: object) -> None:
    """Fills a field of the settings, which a phone keeps folded."""
    field = page.get_by_label(label, exact=True)
    if folded := not field.is_visible():
        page.get_by_role("button", name="Settings").click()
    field.fill(str(value))
    field.blur()
    if folded:
        page.get_by_role("button", name="Settings").click()


def send(page: Page, text: str) -> dict[str, Any]:
    """Sends a message; returns the request's body."""
    page.get_by_label("Message").fill(text)
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Send").click()
    return dict(request.value.post_data_json)


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=PATIENCE)


def figures(page: Page) -> dict[str, str]:
    """What stands under the last answer."""
    groups = page.locator(".assistant").last.locator(".figures div").all()
    return {group.locator("dt").inner_text(): group.locator("dd").inner_text() for group in groups}


def answers(page: Page) -> list[str]:
    """Thinking and text of each answer."""
    return page.locator(".assistant").evaluate_all(
        "all => all.map(one => [...one.querySelectorAll('.text')].map(part => part.textContent).join('|'))"
    )


def canned(page: Page, *bodies: list[dict[str, Any]], status: int = 200) -> list[dict[str, Any]]:
    """Answers chat requests with these chunks, the last ones again and again; returns what was asked."""
    asked: list[dict[str, Any]] = []

    def answer(route: Route, request: Request) -> None:
        chunks = bodies[min(len(asked), len(bodies) - 1)]
        asked.append({**request.post_data_json, "key": request.headers.get("authorization")})
        if status == 200:
            events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            route.fulfill(content_type="text/event-stream", body="".join(events) + "data: [DONE]\n\n")
        else:
            route.fulfill(status=status, json=chunks[0])

    page.route("**/v1/chat/completions", answer)
    return asked


def delta(finish: str | None = None, **parts: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": parts, "finish_reason": finish}]}


def calculation(call: str, expression: str) -> list[dict[str, Any]]:
    """A thought and a tool call, its arguments in two pieces."""
    arguments = json.dumps({"expression": expression})
    first = {"index": 0, "id": call, "type": "function", "function": {"name": "calculator", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:9], arguments[9:])]
    calls = [delta(tool_calls=[part]) for part in (first, *pieces)]
    return [delta(reasoning_content="Multiply."), *calls, delta("tool_calls")]


# ---------------------------------------------------------------------------------- the conversation
def test_an_answer_streams_and_its_figures_are_the_servers(opened: Open) -> None:
    page = opened()
    page.evaluate(
        "() => { window.lengths = new Set(); new MutationObserver(() => window.lengths.add("
        "document.querySelector('.assistant')?.textContent.length)).observe(document.getElementById('messages'),"
        "{subtree: true, childList: true, characterData: true}); }"
    )
    body = send(page, "Tell me of the sea.")
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["xray"]
    assert body["messages"] == [{"role": "user", "content": "Tell me of the sea."}] and body["max_tokens"] == 40
    assert body["model"] == page.request.get(f"{page.url}v1/models").json()["data"][0]["id"]
    finished(page)
    assert page.evaluate("window.lengths.size") > 3  # it grew, and did not come all at once
    assert len(answers(page)[0]) > 5
    data = recorded(page)
    shown = figures(page)
    assert int(shown["Tokens"]) == len(data["tokens"]) - data["prompt_tokens"] <= 40
    assert int(shown["Prompt"].split()[0]) == data["prompt_tokens"]
    assert float(shown["Tokens/s"]) > 0 and float(shown["First token"].split()[0]) > 0


def test_stop_ends_the_answer(opened: Open) -> None:
    page = opened(most=4000)
    page.evaluate(  # at its first letter: a small model may end by itself before a test could click
        "() => new MutationObserver((_, observer) => {"
        "if (!document.querySelector('.assistant .text:not(:empty)')) return;"
        "observer.disconnect(); document.getElementById('stop').click() })"
        ".observe(document.getElementById('messages'), {subtree: true, childList: true, characterData: true})"
    )
    send(page, "Go on and on, slowly.")
    finished(page)
    assert figures(page)["Ended"] == "stopped by you"
    before = answers(page)
    page.wait_for_timeout(500)
    assert answers(page) == before and len(before[0]) > 1
    send(page, "And now?")  # the half answer is history now
    page.keyboard.press("Escape")
    finished(page)


def test_settings_change_the_request(opened: Open) -> None:
    page = opened()
    canned(page, [delta("stop", content="Yes.")])
    for label, effort in (("Off", "none"), ("High", "high"), ("Max", "max")):
        page.get_by_role("radio", name=label).check(force=True)
        assert send(page, "Hello")["reasoning_effort"] == effort
        finished(page)
    assert {"thinking_token_budget", "temperature", "tools"}.isdisjoint(send(page, "Hello"))
    finished(page)
    setting(page, "Thinking budget", 12)
    setting(page, "Temperature", 0.5)
    setting(page, "System prompt", "Be brief.")
    page.get_by_role("switch", name="Calculator tool").check()
    body = send(page, "Hello")
    assert (body["thinking_token_budget"], body["temperature"], body["max_tokens"]) == (12, 0.5, 40)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["tools"][0]["function"]["name"] == "calculator"
    page.reload()
    assert page.get_by_label("Thinking budget").input_value() == "12"  # kept


def test_thinking_stands_apart_and_folds(opened: Open) -> None:
    page = opened()
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "completion_tokens_details": {
        "reasoning_tokens": 3, "accepted_prediction_tokens": 2, "rejected_prediction_tokens": 1,
    }, "prompt_tokens_details": {"cached_tokens": 4}}  # fmt: skip
    canned(page, [delta(reasoning_content="So "), delta(reasoning_content="be it."), delta("stop", content="Yes."),
                  {"id": "chatcmpl-1", "choices": [], "usage": usage}])  # fmt: skip
    send(page, "Is it?")
    finished(page)
    assert answers(page) == ["So be it.|Yes."]
    thinking = page.locator(".thinking")
    assert thinking.get_attribute("open") is None
    assert thinking.locator("summary").inner_text().startswith("Thought · 3 tokens · ")
    thinking.locator("summary").click()
    expect(thinking.locator(".text")).to_be_visible()
    shown = figures(page)
    assert (shown["Tokens"], shown["Prompt"], shown["Drafts accepted"]) == ("5", "9 (4 cached)", "2 of 3")


def test_the_calculator_runs_in_the_page(opened: Open) -> None:
    page = opened()
    page.get_by_role("switch", name="Calculator tool").check()
    asked = canned(page, calculation("call_1", "12.5 * (3 + 4)"), [delta("stop", content="It is 87.5.")])
    send(page, "How much?")
    expect(page.locator(".content").last).to_have_text("It is 87.5.")
    finished(page)
    assert page.locator(".calls li").inner_text() == "calculator 12.5 * (3 + 4) = 87.5"
    _, call, result = asked[1]["messages"]
    assert call["reasoning_content"] == "Multiply." and call["tool_calls"][0]["id"] == "call_1"
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"expression": "12.5 * (3 + 4)"}
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "87.5"}


def test_a_model_that_only_calls_the_tool_is_stopped(opened: Open) -> None:
    page = opened()
    page.get_by_role("switch", name="Calculator tool").check()
    asked = canned(page, *(calculation(f"call_{i}", "1/0") for i in range(9)))
    send(page, "How much?")
    expect(page.get_by_role("alert")).to_contain_text("after 5 steps")
    assert len(asked) == 5 and asked[1]["messages"][-1]["content"] == "Error: division by zero."


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("-(2 - 5) / 4", 0.75), ("2 - 3 - 4", -5), (".5 × 8 ÷ 2", 2),
        ("1.5e3 - +1", 1499), ("2 * (3", "ends too early"), ("2 ** 3", "unexpected *"), ("1 / 0", "division by zero"),
        ("alert(1)", '"a" is neither'), ("", "ends too early"), ("1" * 1001, "longer than"), ("1e999", "too large"),
        ("3 4", "unexpected 4"),
    ],
)  # fmt: skip
def test_calculator(calculator: Callable[[str], Any], expression: str, expected: object) -> None:
    found = calculator(expression)
    assert expected in found if isinstance(expected, str) else found == expected


@pytest.fixture(scope="module")
def calculator(browser: Browser, live_server: str) -> Callable[[str], Any]:
    page = browser.new_page()
    page.goto(live_server)
    script = """async text => {
        const { calculate } = await import(new URL("calculator.js", document.baseURI));
        try { return calculate(text) } catch (error) { return error.message }
    }"""
    return lambda expression: page.evaluate(script, expression)


def test_errors_are_one_sentence_and_leave_no_trace(opened: Open) -> None:
    page = opened()
    canned(
        page, [{"error": {"message": "temperature is 9; expected 0 to 2", "type": "invalid_request_error"}}], status=400
    )
    send(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("temperature is 9; expected 0 to 2.")
    assert page.locator(".assistant").count() == 0
    page.unroute("**/v1/chat/completions")
    asked = canned(page, [delta(content="Half"), {"error": {"message": "the engine stopped"}}])
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("the engine stopped.")
    assert asked[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert answers(page) == ["|Half"] and figures(page)["Ended"] == "broken off"


def test_the_key_is_asked_for_only_where_the_server_wants_one(opened: Open) -> None:
    page = opened()
    key = page.get_by_label("API key")
    expect(key).to_be_hidden()
    canned(page, [{"error": {"message": "API key is missing"}}], status=401)
    send(page, "Hello")
    expect(key).to_be_focused()
    page.unroute("**/v1/chat/completions")
    asked = canned(page, [delta("stop", content="Welcome.")])
    key.fill("secret")
    key.blur()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".content")).to_have_text("Welcome.")
    assert asked[0]["key"] == "Bearer secret"


def test_a_reload_restores_and_a_new_chat_forgets(opened: Open) -> None:
    page = opened()
    send(page, "Remember the sea.")
    finished(page)
    before, shown = answers(page), figures(page)
    page.reload()
    assert page.locator(".user .text").inner_text() == "Remember the sea."
    assert answers(page) == before and figures(page) == shown
    page.get_by_role("button", name="X-ray").click()
    expect(page.locator("#chips .chip.hit").first).to_be_visible()
    page.keyboard.press("Escape")
    messages = send(page, "And then?")["messages"]
    assert messages[0]["content"] == "Remember the sea." and messages[-1]["content"] == "And then?"
    finished(page)
    page.get_by_role("button", name="New chat").click()
    page.reload()
    assert answers(page) == []


def test_the_last_question_can_be_changed_or_asked_again(opened: Open) -> None:
    page = opened()
    asked = canned(page, [delta("stop", content="One.")], [delta("stop", content="Two.")])
    send(page, "First")
    finished(page)
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".content")).to_have_text("Two.")
    finished(page)
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Message")).to_have_value("First")
    send(page, "Second")
    finished(page)
    assert [body["messages"][-1]["content"] for body in asked] == ["First", "First", "Second"]
    assert [len(body["messages"]) for body in asked] == [1, 1, 1]


# ---------------------------------------------------------------------------------- the X-ray
def recorded(page: Page, path: str = "", message: int = -1) -> Any:
    """The server's own account of an answer."""
    kept = json.loads(page.evaluate("sessionStorage.getItem('nanoglm.messages')"))
    found = page.request.get(f"{page.url}xray/{kept[message]['figures']['id']}{path}")
    assert found.ok
    return found.json()


def answered(opened: Open, **how: Any) -> Page:
    """The page with the X-ray of an answer open."""
    page = opened(**how)
    send(page, "Tell me of the sea, of ships and of those who wait at home until the ships are back in the harbour.")
    finished(page)
    page.get_by_role("button", name="X-ray").click()
    expect(page.locator("#chips .chip.hit").first).to_be_visible()
    return page


def chosen(page: Page) -> int:
    return int(page.locator("#chips .chosen").get_attribute("data-position") or -1)


def hits(page: Page) -> dict[int, int]:
    """Highlighted position -> by how many layers."""
    return dict(
        page.locator("#chips .hit").evaluate_all("all => all.map(c => [+c.dataset.position, +c.dataset.count])")
    )


def choose(page: Page, position: int) -> None:
    page.locator(f"#token-{position}").click()
    expect(page.locator("#token-text")).to_contain_text(f"position {position:,} ")


def test_xray_shows_what_the_server_recorded(opened: Open) -> None:
    page = answered(opened)
    data = recorded(page)
    tokens, prompt, full = data["tokens"], data["prompt_tokens"], data["full_layers"]
    texts = page.locator("#chips .chip").evaluate_all("all => all.map(chip => chip.textContent)")
    assert len(texts) == len(tokens)
    assert [text for text in texts if text.isalnum()] == [t["text"] for t in tokens if t["text"].isalnum()]
    assert page.locator("#chips .output").count() == len(tokens) - prompt
    drafted = page.locator("#chips .drafted").evaluate_all("all => all.map(chip => +chip.dataset.position)")
    assert drafted == [prompt + i for i, yes in enumerate(data["drafted"]) if yes]
    assert chosen(page) == min(prompt, data["rows"] - 1)

    for position in (0, prompt // 2, prompt, data["rows"] - 1):
        choose(page, position)
        row = recorded(page, f"/{position}")
        assert row["selected"].keys() == {str(layer) for layer in full}
        page.get_by_role("radio", name="All Full layers").check(force=True)
        everywhere = [p for found in row["selected"].values() for p in found]
        assert hits(page) == {p: everywhere.count(p) for p in everywhere}
        for layer in full:
            page.locator(f"#layers input[value='{layer}']").check(force=True)
            assert hits(page) == dict.fromkeys(row["selected"][str(layer)], 1)
        for layer in data["moe_layers"]:
            fired = page.locator(f"#experts li[data-layer='{layer}'] .fired")
            assert fired.evaluate_all("all => all.map(cell => +cell.dataset.expert)") == row["experts"][str(layer)]


def test_the_last_token_may_have_selected_nothing(opened: Open) -> None:
    page = answered(opened)
    data = recorded(page)
    if data["rows"] == len(data["tokens"]):
        pytest.skip("the answer's last token was run")
    choose(page, len(data["tokens"]) - 1)
    expect(page.locator("#token-note")).to_contain_text("selected nothing")
    assert hits(page) == {} and page.locator(".fired").count() == 0


def test_the_strip_shows_which_layers_reuse_which_selection(opened: Open) -> None:
    page = answered(opened)
    data = recorded(page)
    groups = page.locator("#layers .group:has(.cell)").evaluate_all(
        "all => all.map(group => [...group.querySelectorAll('.cell')].map(c => c.textContent))"
    )
    letter = data["pattern"]
    layers = range(len(letter))
    expected = [[source, *(i for i in layers if data["source"][i] == source != i)] for source in data["full_layers"]]
    assert groups == [[f"{letter[i]}{i}" for i in group] for group in expected]
    assert sum(map(len, groups)) == len(letter)


def test_heat_map_and_its_table(opened: Open) -> None:
    page = answered(opened)
    data = recorded(page)
    layer = data["full_layers"][-1]
    page.locator(f"#layers input[value='{layer}']").check(force=True)
    expect(page.locator("#heat-note")).to_contain_text(f"layer {layer} selected")
    bins = min(64, len(data["tokens"]))
    heat = recorded(page, f"/heat?layer={layer}&bins={bins}")
    canvas = page.locator("#heat canvas")
    assert canvas.evaluate("c => [c.width, c.height]") == [bins, len(heat["rows"])]
    filled = canvas.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )
    assert [alpha > 0 for alpha in filled] == [count > 0 for row in heat["counts"] for count in row]

    row = len(heat["rows"]) // 2
    canvas.scroll_into_view_if_needed()
    canvas.evaluate(
        "(c, y) => { const box = c.getBoundingClientRect(); c.dispatchEvent(new MouseEvent('click', "
        "{bubbles: true, clientX: box.left + 5, clientY: box.top + box.height * y})) }",
        (row + 0.5) / len(heat["rows"]),
    )
    expect(page.locator("#heat")).to_have_attribute("aria-valuenow", str(heat["rows"][row]))
    assert chosen(page) == heat["rows"][row]
    page.locator("#heat").press("ArrowDown")
    assert chosen(page) == heat["rows"][row + 1]
    expect(page.locator("#heat")).to_have_attribute("aria-valuetext", re.compile(f"^position {chosen(page)}, "))

    page.get_by_text("As a table").click()
    own = page.locator("#heat-table td:nth-child(2)").all_inner_texts()
    assert sum(map(int, own)) == sum(heat["counts"][row + 1])


def test_xrays_of_two_answers_do_not_mix(opened: Open) -> None:
    page = answered(opened)
    page.keyboard.press("Escape")
    send(page, "Once more, but for longer.")
    finished(page)
    for button, message in ((0, 1), (1, 3), (0, 1)):
        page.get_by_role("button", name="X-ray").nth(button).click()
        expect(page.locator("#chips .chip.hit").first).to_be_visible()
        tokens = recorded(page, message=message)["tokens"]
        assert page.locator("#chips .chip").count() == len(tokens)
        page.locator("#chips").press("End")
        assert chosen(page) == len(tokens) - 1
        page.keyboard.press("Escape")


def test_xray_that_is_gone_says_so(opened: Open) -> None:
    page = opened()
    canned(page, [delta("stop", content="Yes.")])
    send(page, "Hello")
    finished(page)
    page.get_by_role("button", name="X-ray").click()
    expect(page.locator("#xray-failure")).to_have_text(re.compile(r"\w.*\.$"))
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#xray")).to_be_hidden()


# ---------------------------------------------------------------------------------- for everyone
def test_keyboard_alone(opened: Open) -> None:
    page = opened()
    page.reload()
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("Tell me of the sea.")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Max")).to_be_checked()
    page.keyboard.press("Tab")
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    assert request.value.post_data_json["reasoning_effort"] == "max"
    finished(page)
    expect(page.get_by_role("button", name="Send")).to_be_focused()  # Stop had been there

    tab_to(page, page.get_by_role("button", name="X-ray"), "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#chips")).to_be_focused()
    start = chosen(page)
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert chosen(page) == start + expected
    page.keyboard.press("Home")
    assert chosen(page) == 0
    page.keyboard.press("ArrowDown")
    assert chosen(page) > 0  # on the second line
    assert page.locator("#chips").get_attribute("aria-activedescendant") == f"token-{chosen(page)}"
    tab_to(page, page.get_by_role("radio", name="All Full layers"), "Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#layers input").nth(1)).to_be_checked()
    tab_to(page, page.locator("#heat"), "Tab")
    page.keyboard.press("End")
    assert chosen(page) == int(page.locator("#heat").get_attribute("aria-valuemax") or -1)
    page.keyboard.press("Escape")
    expect(page.locator("#xray")).to_be_hidden()
    expect(page.get_by_role("button", name="X-ray")).to_be_focused()


def tab_to(page: Page, target: Any, key: str) -> None:
    for _ in range(20):
        page.keyboard.press(key)
        if target.evaluate("it => it === document.activeElement"):
            outline = target.evaluate("it => getComputedStyle(it.closest('label') ?? it).outlineStyle")
            assert outline == "solid"  # the focus can be seen
            return
    raise AssertionError(f"{key} does not come to {target}")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened: Open, size: tuple[int, int], theme: str) -> None:
    page = opened(size=size, theme=theme)
    if size == PHONE:
        page.get_by_role("button", name="Settings").click()
    assert serious(page) == []
    if size == PHONE:
        page.get_by_role("button", name="Settings").click()
    send(page, "Tell me of the sea, of ships and of those who wait at home until the ships are back in the harbour.")
    finished(page)
    for thinking in page.locator(".thinking:not([hidden]) summary").all():
        thinking.click()
    assert serious(page) == []
    fits(page, "document.documentElement")
    page.get_by_role("button", name="X-ray").click()
    expect(page.locator("#chips .chip.hit").first).to_be_visible()
    for summary in page.locator("#xray summary").all():
        summary.click()
    expect(page.locator("#heat-table td").first).to_be_visible()
    assert serious(page) == []
    fits(page, "document.getElementById('xray-body')")


def test_axe_finds_nothing_serious_in_errors_and_calls(opened: Open) -> None:
    page = opened(theme="dark")
    page.get_by_role("switch", name="Calculator tool").check()
    canned(page, calculation("call_1", "1/0"), [{"error": {"message": "the engine stopped"}}])
    send(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("the engine stopped")
    assert serious(page) == []
    page.get_by_role("button", name="Dark").click()  # off
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(248, 246, 241)"
    assert serious(page) == []
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def serious(page: Page) -> list[str]:
    violations = Axe().run(page).response["violations"]
    return [
        f"{found['id']}: {found['nodes'][0]['html']}"
        for found in violations
        if found["impact"] in ("serious", "critical")
    ]


def fits(page: Page, element: str) -> None:
    """Nothing has to be scrolled sideways, and no control lies beyond the edge."""
    assert page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth")
    script = "all => all.filter(one => one.getBoundingClientRect().right > innerWidth).map(one => one.id)"
    assert page.locator("button, input, textarea, canvas, summary").evaluate_all(script) == []
