"""The page in a real Chromium against a real service: add a document, ask, follow a citation to the words."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.browser import IN_CHROMIUM, Page, tab_through

pytestmark = IN_CHROMIUM

WIDTHS = (1440, 1000, 768, 320)
PDF = Path(__file__).resolve().parents[2] / "samples" / "documents" / "fr12-handbook.pdf"
ORDERS = """# Notes
<script>document.title = "taken over"</script>
<img src="https://example.invalid/x" onerror="document.title='taken over'">
[remote](https://example.invalid) ![picture](https://example.invalid/y.png)
"""


def test_citation_leads_to_its_words(page, handbook):
    page.add(handbook)
    turn = page.ask("When is the lamp trimmed?")
    quote = turn.find_element(By.CSS_SELECTOR, ".passage .quote").text
    turn.find_element(By.CSS_SELECTOR, ".cite").click()
    page.wait(lambda: page.find_all("#source-text mark"))
    marked = "".join(mark.text for mark in page.find_all("#source-text mark"))
    assert quote and " ".join(marked.split()) == " ".join(quote.split())
    assert "handbook.md" in page.find("#source-title").text
    assert "prompt tokens from the cache" in turn.text and "first words after" in turn.text


def test_citation_shows_its_quote_among_the_words_around_it(page, handbook):
    page.add(handbook)
    turn = page.ask("When is the lamp trimmed?")
    quote, excerpt = (turn.find_element(By.CSS_SELECTOR, f".passage .{name}").text for name in ("quote", "excerpt"))
    assert quote in excerpt and len(excerpt) > len(quote)
    assert " ".join(excerpt.strip("…").split()) in " ".join(handbook.read_text().split())


def restore(page: Page, answer: dict) -> None:
    """A conversation as the page keeps it."""
    measured = {"usage": {"input_tokens": 9, "cached_input_tokens": 0}, "sources": []}
    thread = [{"question": "How often?", "collection": "default", "answer": measured | answer}]
    page.driver.execute_script("sessionStorage.setItem('jamba-rag.thread', arguments[0])", json.dumps(thread))
    page.driver.refresh()
    page.wait(lambda: page.find_all(".turn"))


def test_tables_are_shown_row_by_row(page):
    table = "Land | Cost\nLand: Spain | Cost: 7\nLand: Malta | Cost: 9\n\nA note\nbelow."
    place = {"document_id": "d", "filename": "a.md", "chunk_id": "c"}
    source = place | {"text": table, "location": {"char_start": 10, "char_end": 10 + len(table)}}
    at = 10 + table.index("7")
    cited = place | {"cited_text": "7", "location": {"char_start": at, "char_end": at + 1}, "start": 0, "end": 1}
    restore(page, {"grounding": "answered", "text": "7", "citations": [cited], "sources": [source]})
    assert page.find(".passage .excerpt").text == "Land: Spain | Cost: 7"
    restore(page, {"grounding": "not_found", "text": "", "citations": [], "sources": [source]})
    assert (
        page.find(".passage .excerpt").text
        == "Land | Cost\nLand: Spain | Cost: 7\nLand: Malta | Cost: 9\nA note below."
    )


def test_a_quote_is_seen_whole_on_a_narrow_screen(page):
    text = f"{'Many words come before it. ' * 6}It ends on 28 February 2031."
    place = {"document_id": "d", "filename": "a.md", "chunk_id": "c"}
    source = place | {"text": text, "location": {"char_start": 0, "char_end": len(text)}}
    quote = text[-17:-1]
    cited = place | {"cited_text": quote, "location": {"char_start": len(text) - 17, "char_end": len(text) - 1}}
    answer = {"grounding": "answered", "text": quote, "citations": [cited | {"start": 0, "end": 16}]}
    with page.screen(320):
        restore(page, answer | {"sources": [source]})
        excerpt, shown = page.find(".excerpt").rect, page.find(".excerpt .quote").rect
    assert quote == "28 February 2031" and shown["y"] + shown["height"] <= excerpt["y"] + excerpt["height"] + 1


def test_sentences_without_a_quote_are_marked(page):
    """With an answer of a model that writes freely."""
    quote = {"document_id": "d", "filename": "a.md", "chunk_id": "c", "cited_text": "twice", "location": {}}
    answer = {
        "grounding": "answered",
        "text": "🌊 Sea air. The lamp is trimmed “twice”. At night.",
        "citations": [quote | {"start": 32, "end": 37}],
    }
    restore(page, answer)
    assert [span.text for span in page.find_all(".unsupported")] == ["🌊 Sea air.", "At night."]
    assert "nobody checked them" in page.find(".turn .footer").text
    assert page.find(".turn .answer").text == "🌊 Sea air. The lamp is trimmed “twice”1. At night."
    assert page.barriers() == []


def test_says_what_a_question_will_read(page, handbook):
    page.add(handbook)
    page.wait(lambda: "each question reads all of it" in page.find("#collection-facts").text)
    facts = "return (await import('/web/documents.js')).describeReading(arguments[0])"
    describe = lambda whole, fits: page.driver.execute_script(facts, {"reads_whole": whole, "fits_context": fits})
    assert describe(False, True) == "each question reads the best passages"
    assert "too long to be read whole" in describe(False, False)


def test_sizes_have_three_digits_at_most(page):
    script = "return (await import('/web/dom.js')).formatBytes(arguments[0])"
    shown = [page.driver.execute_script(script, size) for size in (7, 999, 1000, 999_400, 999_977, 999_999_999)]
    assert shown == ["7 bytes", "999 bytes", "1.0 KB", "999 KB", "1.0 MB", "1.0 GB"]


def test_empty_collection_asks_for_documents_first(page, handbook):
    with page.screen(360):
        assert page.find("#welcome-empty").is_displayed()
        page.find("#add-first").click()
        assert page.driver.switch_to.active_element.get_attribute("id") == "choose-files"
        page.add(handbook)
        page.find("[data-show=ask]").click()
        assert page.find("#welcome-hint").is_displayed() and not page.find_all("#welcome-empty")


def test_everything_is_done_by_keyboard(page, handbook):
    page.add(handbook)
    reached = tab_through(page.driver, 40)
    wanted = {"collection", "new-collection", "delete-collection", "choose-files", "choose-folder", "question", "mode"}
    assert wanted | {"ask-button", "sign-out"} <= reached
    page.find("#question").send_keys("When is the lamp trimmed?", Keys.ENTER)
    page.wait(lambda: page.find_all(".measures"))
    page.find(".passage").send_keys(Keys.ENTER)
    page.wait(lambda: page.find_all("#source-text mark"))
    assert {"source-close", "source-download", "source-text"} <= tab_through(page.driver, 40)
    page.find(f"button[aria-label='Delete {handbook.name}']").send_keys(Keys.ENTER)
    page.wait(lambda: page.find_all("#confirm"))
    page.driver.switch_to.active_element.send_keys(Keys.TAB, Keys.ENTER)
    page.wait(lambda: page.line(handbook.name) is None)
    assert not page.find_all("#source")


def test_citation_in_a_pdf_leads_to_the_picture_of_its_page(page):
    page.add(PDF)
    page.cite(page.ask("How high is the mast?"))
    image = page.find(".page-image")
    page.wait(lambda: image.get_property("naturalWidth") > 500)
    quote = page.find(".passage .quote").text
    assert " ".join(quote.split())[:20] in " ".join(image.get_attribute("alt").split())
    height = page.driver.execute_script("return arguments[0].clientHeight", page.find("#source-text"))
    page.find("#source-zoom").click()
    assert image.rect["width"] >= 900 and image.rect["height"] > height
    page.find("#source-view").click()
    page.wait(lambda: page.find_all("#source-text mark"))
    assert not page.find_all(".page-image, #source-zoom")
    page.find("#source-view").click()
    page.wait(lambda: page.find_all(".page-image"))
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.get_attribute("class") == "cite"


def test_page_without_a_picture_is_shown_as_text(page):
    page.add(PDF)
    turn = page.ask("How high is the mast?")
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/image?*"]})
    try:
        turn.find_element(By.CSS_SELECTOR, ".cite").click()
        page.wait(lambda: page.find_all("#source-text mark"))
        assert not page.find_all(".page-image, #source-view")
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})


def test_page_on_which_the_words_are_not_found_can_be_looked_at(page):
    page.add(PDF)
    with page.service.client() as client:
        (document,) = client.get(
            "/v1/documents", params={"collection": page.find("#collection").get_property("value")}
        ).json()["data"]
    place = {"page_start": 1, "page_end": 1, "char_start": 0, "char_end": 0}
    cited = {"document_id": document["id"], "filename": PDF.name, "chunk_id": "c", "cited_text": "x", "location": place}
    restore(page, {"grounding": "answered", "text": "x", "citations": [cited | {"start": 0, "end": 1}]})
    page.find(".cite").click()
    page.wait(lambda: page.find_all("#source-view") and page.find("#source-view").text == "Page")
    assert PDF.name in page.find("#source-title").text and not page.find_all(".page-image")
    page.find("#source-view").click()
    page.wait(lambda: page.find_all(".page-image"))
    assert page.find("#source-view").text == "Text"


def test_follow_up_takes_the_conversation_along(page, handbook):
    page.add(handbook)
    page.keep_requests()
    page.ask("When is the lamp trimmed?")
    page.ask("And why?")
    said = page.answers()[0]["text"]
    assert len(page.find_all(".turn")) == 2
    page.find("#clear-thread").click()
    assert not page.find_all(".turn") and page.find_all("#welcome")
    page.ask("When does the boat come?")
    sent = [request["messages"] for request in page.requests()]
    assert [[message["role"] for message in messages] for messages in sent] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert [message["content"] for message in sent[1][::2]] == ["When is the lamp trimmed?", "And why?"]
    assert sent[1][1]["content"] == said


def test_escape_closes_the_source_and_returns_the_focus(page, handbook):
    page.add(handbook)
    page.ask("When does the boat come?").find_element(By.CSS_SELECTOR, ".cite").send_keys(Keys.ENTER)
    page.wait(lambda: page.find_all("#source-text mark"))
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.find_all("#source")
    assert page.driver.switch_to.active_element.get_attribute("class") == "cite"


def test_second_question_uses_the_cache(page, handbook):
    page.add(handbook)
    page.ask("When is the lamp trimmed?")
    measures = page.ask("When does the boat come?").find_element(By.CSS_SELECTOR, ".measures").text
    assert not measures.partition(" · ")[2].startswith("0 of")


def test_says_when_there_are_no_documents(page):
    turn = page.ask("Who owns the moon?")
    assert turn.find_element(By.CSS_SELECTOR, ".not-found").text == "There are no documents to answer this from."


def test_failed_document_says_why_and_can_go(page, tmp_path):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7\nthis is no PDF at all\n" * 20)
    line = page.add(broken)
    assert line.get_attribute("data-status") == "failed"
    assert len(line.find_element(By.CSS_SELECTOR, ".state").text) > 10
    assert page.find_all(f"button[aria-label='Retry {broken.name}']")
    page.wait(lambda: "1 failed" in page.find("#collection-facts").text)
    page.find(f"button[aria-label='Delete {broken.name}']").click()
    page.find("#confirm-yes").click()
    page.wait(lambda: page.line(broken.name) is None)
    assert "failed" not in page.find("#collection-facts").text


def test_document_read_in_part_says_what_is_missing(page, tmp_path):
    path = tmp_path / "lamps.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lamps.txt", "The lamp is trimmed twice a night.")
        archive.writestr("photo.png", b"\x89PNG\r\n\x1a\n")
    line = page.add(path)
    note = line.find_element(By.CSS_SELECTOR, ".note")
    assert line.get_attribute("data-status") == "ready" and note.is_displayed()
    assert note.text.startswith("Read only in part: 1 of 2 files") and "photo.png" in note.text
    assert note.text in page.find("#announcer").get_property("textContent")
    assert page.barriers() == []


def test_file_that_is_there_already_leaves_the_focus_where_somebody_types(page, handbook):
    page.add(handbook)
    page.find("#question").send_keys("When is the lamp")
    page.find("#files").send_keys(str(handbook))
    page.wait(lambda: "already here" in page.find("#announcer").get_property("textContent"))
    assert page.driver.switch_to.active_element.get_attribute("id") == "question"
    assert len(page.find_all("#document-list li")) == 1


def test_text_that_runs_from_the_right_stands_at_the_right(page, tmp_path):
    path = tmp_path / "policy.txt"
    path.write_text("يحجز كل موظف رحلته قبل 14 يوما.\n\nThe hotel costs 120 euros.\n")
    page.add(path)
    page.find("#document-list .link").click()
    page.wait(lambda: "120 euros" in page.find("#source-text").text)
    gaps = page.driver.execute_script("""
        const view = document.getElementById("source-text").getBoundingClientRect();
        const range = document.createRange();
        range.selectNodeContents(document.getElementById("source-text"));
        const lines = [...range.getClientRects()].filter(({ width }) => width > 20);
        return [lines[0], lines.at(-1)].map(({ left, right }) => [left - view.left, view.right - right]);""")
    (arabic_left, arabic_right), (english_left, english_right) = gaps
    assert arabic_right < arabic_left and english_left < english_right


def test_refused_file_says_why(page, tmp_path):
    program = tmp_path / "program.bin"
    program.write_bytes(bytes(range(256)) * 40)
    assert "upload" not in (page.add(program).find_element(By.CSS_SELECTOR, ".state").text or "upload")
    assert "1 failed" in page.find("#collection-facts").text


def test_nothing_of_a_document_runs_or_is_fetched(page, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text(ORDERS)
    page.add(notes)
    page.driver.get_log("browser")
    page.find("#document-list .link").click()
    page.wait(lambda: "onerror" in page.find("#source-text").text)
    page.ask("What do the notes say?")
    assert page.driver.title == "Jamba RAG"
    assert page.driver.find_elements(By.CSS_SELECTOR, "img, iframe, script:not([src]), a[href^=http]") == []
    fetched = page.driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in fetched if not name.startswith(page.service.url)] == []
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_reload_keeps_the_answers(page, handbook):
    page.add(handbook)
    answer = page.ask("When is the lamp trimmed?").find_element(By.CSS_SELECTOR, ".answer").text
    page.driver.refresh()
    page.wait(lambda: page.find_all(".turn"))
    assert page.find(".turn .answer").text == answer


def test_reload_in_mid_answer_offers_to_ask_again(page, handbook):
    page.add(handbook)
    page.find("#question").send_keys("When is the lamp trimmed?")
    page.driver.execute_script("document.querySelector('#ask-form').requestSubmit(); location.reload()")
    page.wait(lambda: page.find_all(".turn .footer button"))
    assert "reloaded before the answer was complete" in page.find(".turn .footer").text
    page.wait(lambda: page.line(handbook.name))
    page.find(".turn .footer button").click()
    page.wait(lambda: page.find_all(".measures"))
    turn = page.find_all(".turn")[-1]
    assert turn.find_element(By.CSS_SELECTOR, "h3").text == "When is the lamp trimmed?"
    assert handbook.name in turn.find_element(By.CSS_SELECTOR, ".passage .where").text


def test_wrong_key_is_refused(driver, service):
    page = Page(driver, service)
    driver.get(service.url)
    driver.execute_script("sessionStorage.clear()")
    page.sign_in("not-a-key")
    page.wait(lambda: page.find_all("#sign-in-error"))
    assert not page.find_all("#workspace")


def bottom_of(control: WebElement) -> float:
    return control.rect["y"] + control.rect["height"]


def test_fits_the_screen(page, handbook):
    page.add(handbook)
    page.ask("When is the lamp trimmed?")
    for width in WIDTHS:
        with page.screen(width):
            assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
            for row in (".bar", ".ask-form .row"):
                controls = page.find_all(f"{row} button, {row} select")
                assert max(control.rect["y"] for control in controls) < min(map(bottom_of, controls)), width
            controls = page.find_all("button, select, textarea")
            assert [control.text for control in controls if control.rect["x"] + control.rect["width"] > width] == []


def test_every_control_has_a_name(page, handbook):
    page.add(handbook)
    page.ask("When is the lamp trimmed?").find_element(By.CSS_SELECTOR, ".cite").click()
    page.wait(lambda: page.find_all("#source-text mark"))
    controls = page.find_all("button, input, select, textarea, progress, [role=region], aside, section, nav")
    assert [control.get_attribute("outerHTML") for control in controls if not control.accessible_name] == []


def test_axe_finds_no_barrier(page, handbook):
    def click(selector: str) -> None:
        page.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def look(show: Callable[[], None] = lambda: None, hide: Callable[[], None] = lambda: None) -> None:
        """On all screens, in the dark and in the light, at what `show` brings there."""
        for width in WIDTHS:
            with page.screen(width):
                show()
                for scheme in ("dark", "light"):
                    page.prefer(scheme)
                    assert page.barriers() == [], f"{width} pixels, {scheme}"
                hide()

    def open_document() -> None:
        click("#document-list .link")
        page.wait(lambda: page.find("#source-text").text)

    close_source = lambda: page.find("#source-close").click()
    look()
    click("[data-show=documents]")
    page.add(handbook)
    page.add(PDF)
    look()
    click("[data-show=ask]")
    turn = page.ask("How high is the mast?")
    look(lambda: page.cite(turn), close_source)
    look(open_document, close_source)
    page.find("#sign-out").click()
    look()
