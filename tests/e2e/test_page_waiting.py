"""What the page shows while the model reads."""

import pytest
from selenium.webdriver.common.keys import Keys

from tests.e2e.browser import IN_CHROMIUM

pytestmark = IN_CHROMIUM
NEVER_ANSWER = """
const send = window.fetch;
window.fetch = (path, options) => {
  if (!String(path).endsWith("answers")) return send(path, options);
  return new Promise((_, reject) => options.signal.addEventListener("abort", () => reject(options.signal.reason)));
};
"""
KEEP_WORDS = """
window.said = [];
const keep = () => document.querySelectorAll(".waiting").forEach((words) => window.said.push(words.textContent));
new MutationObserver(keep).observe(document.getElementById("thread"), { childList: true, subtree: true });
"""


def test_says_how_far_the_model_has_read(page, tmp_path):
    """30,000 tokens, a letter each."""
    path = tmp_path / "long.txt"
    path.write_text("".join(f"The lamp number {number} is trimmed at noon.\n" for number in range(740)))
    page.add(path)
    page.driver.execute_script(KEEP_WORDS)
    page.find("#question").send_keys("When is the lamp trimmed?", Keys.ENTER)
    page.wait(lambda: "about" in page.find(".waiting").text)
    assert page.barriers() == []
    page.wait(lambda: page.find_all(".measures"))
    said = page.driver.execute_script("return window.said")
    assert said[0] == "Reading…"
    assert any("Reading: " in words and " tokens, about " in words for words in said), said
    assert not page.find_all(".turn progress")


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (None, "Reading…"),
        ({"stage": "waiting", "done": 0, "total": 900, "seconds_left": None}, "Waiting for its turn"),
        ({"stage": "reading", "done": 0, "total": 900, "seconds_left": None}, "Reading…"),
        ({"stage": "reading", "done": 512, "total": 9000, "seconds_left": None}, "Reading: 512 of 9,000 tokens"),
        ({"stage": "reading", "done": 512, "total": 9000, "seconds_left": 0.2}, "tokens, about 1 s left"),
        ({"stage": "reading", "done": 512, "total": 9000, "seconds_left": 290.0}, "tokens, about 5 min left"),
        ({"stage": "writing", "done": 900, "total": 900, "seconds_left": None}, "writing the answer"),
    ],
)
def test_every_stage_has_its_words(page, progress, words):
    script = "return (await import('/web/ask.js')).describeProgress(arguments[0])"
    assert words in page.driver.execute_script(script, progress)


def test_a_question_can_be_stopped(page, handbook):
    page.add(handbook)
    page.driver.execute_script(NEVER_ANSWER)
    page.find("#question").send_keys("When is the lamp trimmed?", Keys.ENTER)
    page.wait(lambda: page.find("#ask-button").text == "Stop")
    page.find("#ask-button").click()
    page.wait(lambda: page.find("#ask-button").text == "Ask")
    assert page.find(".turn .footer .hint").text == "Stopped."
    page.find("#ask-button").click()  # without a question nothing happens
    assert len(page.find_all(".turn")) == 1
