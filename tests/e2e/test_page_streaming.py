"""What the page shows of an answer and of an upload before they are complete, and of what they cost once they are."""

import json
import re

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.e2e.browser import IN_CHROMIUM

pytestmark = IN_CHROMIUM

# the events of an answer come as they are, but each only when `deliver` is called
HOLD_EVENTS = """
window.held = null;
const send = window.fetch;
window.fetch = async (path, options) => {
  const response = await send(path, options);
  if (!String(path).endsWith("v1/answers")) return response;
  const events = (await response.text()).split(/(?<=\\n\\n)/);
  const body = new ReadableStream({
    start(stream) {
      window.deliver = (event) => stream.enqueue(new TextEncoder().encode(event));
      window.deliverNoMore = () => stream.close();
    },
  });
  window.held = events;
  return new Response(body, { headers: response.headers });
};
"""
# what the page looked like each time that it changed, and when the answer's last event came in
KEEP_STEPS = """
window.steps = [];
const send = window.fetch;
window.fetch = async (path, options) => {
  const response = await send(path, options);
  if (!String(path).endsWith("v1/answers")) return response;
  const watch = new TransformStream({
    transform(chunk, stream) {
      if (new TextDecoder().decode(chunk).includes("answer.completed")) window.steps.push("completed");
      stream.enqueue(chunk);
    },
  });
  return new Response(response.body.pipeThrough(watch), { headers: response.headers });
};
const words = () => document.querySelector(".turn:last-child .answer:not(:has(.waiting))")?.textContent;
new MutationObserver(() => words() && window.steps.push(words()))
  .observe(document.getElementById("thread"), { childList: true, subtree: true });
"""
# every state that the first line of the list was in: [status, words, value of the bar or null]
KEEP_LINES = """
window.lines = [];
new MutationObserver(() => {
  const line = document.querySelector("#document-list li");
  const bar = line?.querySelector("progress:not([hidden])");
  const share = bar?.hasAttribute("value") ? bar.value : null;
  if (line) window.lines.push([line.dataset.status, line.querySelector(".state").textContent, share]);
}).observe(document.getElementById("document-list"), { childList: true, subtree: true, attributes: true });
"""
SHOWN = """
const shown = document.querySelector(".turn .answer").cloneNode(true);
shown.querySelectorAll(".cite, .waiting").forEach((element) => element.remove());
return shown.textContent;
"""
STAGES = ("sending", "queued", "parsing", "chunking", "embedding", "indexing", "ready")


def parse(event: str) -> tuple[str, dict]:
    fields = dict(line.split(": ", 1) for line in event.strip().split("\n"))
    return fields["event"], json.loads(fields["data"])


def test_words_and_their_citation_stand_there_before_the_answer_is_complete(page, handbook):
    page.add(handbook)
    page.driver.execute_script(HOLD_EVENTS)
    page.find("#question").send_keys("When is the lamp trimmed?", Keys.ENTER)
    page.wait(lambda: page.driver.execute_script("return window.held"))
    *events, last = [event for event in page.driver.execute_script("return window.held") if event.startswith("id:")]
    text, shown = "", []
    for event in events:
        kind, data = parse(event)
        page.driver.execute_script("window.deliver(arguments[0])", event)
        if kind == "answer.text.delta":
            text += data["text"]
            page.wait(lambda said=text: page.driver.execute_script(SHOWN) == said)
            shown.append(text)
            assert page.find(".turn .answer").get_attribute("aria-busy") == "true"
        if kind == "answer.citation.added":
            page.wait(lambda: page.find_all(".turn .answer .cite"))
    assert len(shown) > 3 and page.find("#ask-button").text == "Stop" and not page.find_all(".measures")
    page.cite(page.find(".turn"))  # while the rest of the answer is still to come
    assert page.find(".turn .cite").text == "1" and page.find("#source-text mark").text
    page.driver.execute_script("window.deliver(arguments[0]); window.deliverNoMore()", last)
    page.wait(lambda: page.find_all(".measures"))
    assert parse(last)[0] == "answer.completed" and page.driver.execute_script(SHOWN) == text
    assert page.find(".turn .answer").get_attribute("aria-busy") == "false"


def test_the_service_has_not_finished_when_its_first_words_are_shown(page, handbook):
    """Of some answer: a busy browser may hear of the end of a short one before it has drawn its beginning."""
    page.add(handbook)
    page.driver.execute_script(KEEP_STEPS)
    seen: list[list[str]] = []
    while len(seen) < 10:
        page.driver.execute_script("window.steps = []")
        page.ask("When is the lamp trimmed?")
        seen.append(page.driver.execute_script("return window.steps"))
        early = seen[-1][: seen[-1].index("completed")]
        if early and len(early[0]) < len(page.answers()[-1]["text"]):
            return
    pytest.fail(f"never a word before the end: {seen}")


def test_a_follow_up_shows_its_own_first_token_and_share_of_the_cache(page, handbook):
    page.add(handbook)
    page.ask("When is the lamp trimmed?")
    measures = page.ask("And why?").find_element(By.CSS_SELECTOR, ".measures").text
    _, answer = page.answers()
    usage, first_ms = answer["usage"], answer["timings"]["ttft_ms"]
    cached, read = usage["cached_input_tokens"], usage["input_tokens"]
    assert 0 < cached < read and f"{cached:,} of {read:,} prompt tokens from the cache (memory)" in measures
    shown = re.findall(r"(First token|first words) after ([\d.]+) (ms|s) ·", measures)
    assert [what for what, _, _ in shown] == ["First token", "first words"]
    token_ms, words_ms = (float(number) * {"ms": 1, "s": 1000}[unit] for _, number, unit in shown)
    assert abs(token_ms - first_ms) <= (0.5 if shown[0][2] == "ms" else 50) and words_ms >= first_ms - 50


def test_an_upload_shows_what_is_sent_and_then_what_is_read_of_it(page, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("".join(f"Night {night}: the keeper trimmed the lamp, then wrote this.\n" for night in range(4000)))
    page.driver.execute_script(KEEP_LINES)
    with page.slow_uploads():
        page.find("#files").send_keys(str(path))
        sent = lambda: {words for status, words, _ in lines() if status == "sending" and "%" in words}
        lines = lambda: page.driver.execute_script("return window.lines")
        page.wait(lambda: len(sent()) > 2)
        assert page.find("#document-list progress").accessible_name == f"Progress of {path.name}"
    page.wait(lambda: page.status(path.name) == "ready")
    seen = lines()
    order = [STAGES.index(status) for status, _, _ in seen]
    assert order == sorted(order) and {"sending", "embedding", "ready"} <= {status for status, _, _ in seen}
    sending = [(words, bar) for status, words, bar in seen if status == "sending" and "%" in words]
    assert all(words == f"Sending, {int(100 * bar + 0.5)} %" for words, bar in sending), sending
    assert [bar for _, bar in sending] == sorted(bar for _, bar in sending)
    counts = [(re.search(r"^Embedding, ([\d,]+) of ([\d,]+) chunks$", words), bar) for _, words, bar in seen]
    parts = [([int(number.replace(",", "")) for number in found.groups()], bar) for found, bar in counts if found]
    assert parts and all(abs(done / total - bar) < 1e-6 for (done, total), bar in parts), seen
    assert any(done for (done, _), _ in parts) and seen[-1][1].endswith(" KB") and not page.find_all("li progress")
