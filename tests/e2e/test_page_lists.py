"""The page with long names and many documents, and the page of all calls."""

from pathlib import Path

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.e2e.browser import IN_CHROMIUM

pytestmark = IN_CHROMIUM
NAME = "annual-reports-and-contracts"


def test_a_collection_has_the_room_for_its_name(page):
    page.make_collection(NAME)
    for width in (1440, 820, 360):
        with page.screen(width):
            if width == 360:
                page.find("[data-show=documents]").click()
            shown = page.find("#collection").rect["width"]
            assert shown >= 250, width
            buttons = page.find_all("#choose-files, #choose-folder")
            assert buttons[0].rect["y"] == buttons[1].rect["y"], width
    assert page.find("#collection").get_attribute("title") == NAME
    assert page.find("#question").get_attribute("placeholder") == f"Ask about {NAME}"


def test_a_refusal_takes_no_more_room_than_it_needs(page, tmp_path: Path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n")
    page.find("#files").send_keys(str(photo))
    page.wait(lambda: page.status(photo.name) == "failed")
    state = page.line(photo.name).find_element("css selector", ".state")
    assert "Supported: PDF" in state.get_attribute("title") and state.size["height"] < 140


def test_documents_are_found_by_name_and_status(page, tmp_path: Path):
    paths = [tmp_path / f"minutes-{number}.txt" for number in range(10)]
    for path in paths:
        path.write_text(path.name)
    broken = tmp_path / "Broken.pdf"
    broken.write_bytes(b"%PDF-1.7\nthis is no PDF at all\n" * 20)
    assert not page.find_all("#find-document")
    page.find("#files").send_keys("\n".join(map(str, [*paths, broken])))
    names = lambda: sorted(line.text.split("\n")[0] for line in page.find_all("#document-list li"))
    page.wait(lambda: "10 documents" in page.find("#collection-facts").text and page.status(broken.name) == "failed")
    field = page.find("#find-document")
    for words, found in {"MINUTES 7": ["minutes-7.txt"], "failed": ["Broken.pdf"], "lamps": []}.items():
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(words)
        page.wait(lambda found=found: names() == found)
        assert bool(page.find_all("#none-found")) == (found == [])
        assert page.barriers() == []
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("failed")
    page.wait(lambda: names() == ["Broken.pdf"])
    buttons = [page.find(f"#document-list [aria-label^={name}]") for name in ("Delete", "Retry")]
    page.driver.execute_script("arguments[0].focus(), arguments[1].click()", *buttons)
    page.wait(lambda: names() == [])  # while it is read again
    assert page.driver.switch_to.active_element == page.find("#documents-title")
    page.wait(lambda: names() == ["Broken.pdf"])
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("minutes-3")
    page.wait(lambda: names() == ["minutes-3.txt"])
    page.find("#document-list [aria-label^=Delete]").click()
    page.find("#confirm-yes").click()
    page.wait(lambda: not names() and page.find_all("#none-found"))
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.DELETE)
    page.wait(lambda: len(names()) == 10 and not page.find_all("#none-found"))
    page.make_collection("elsewhere")
    page.wait(lambda: not page.find_all("#find-document"))


def test_documents_are_found_by_the_status_that_is_shown(page):
    script = """
    const { Entry } = await import('/web/entry.js');
    const document = { filename: 'a.txt', status: arguments[0], progress: null };
    const { words, state } = new Entry({}, { document });
    return [words, state.textContent.toLowerCase()];
    """
    for status in ("queued", "parsing", "chunking", "embedding", "indexing"):
        words, shown = page.driver.execute_script(script, status)
        assert shown in words and status in words


def test_the_default_collection_can_only_be_emptied(page, handbook):
    Select(page.find("#collection")).select_by_value("default")
    page.wait(lambda: not page.find("#delete-collection").is_enabled())
    page.add(handbook)
    page.find("#delete-collection").click()
    assert page.find("#confirm-text").text == "Delete 1 document? The collection default stays, empty."
    page.find("#confirm-yes").click()
    page.wait(lambda: not page.find_all("#document-list li") and not page.find("#delete-collection").is_enabled())
    assert page.driver.switch_to.active_element == page.find("#collection")


def test_the_page_of_all_calls_fits_a_narrow_screen(page):
    page.driver.get(f"{page.service.url}/docs")
    with page.screen(360):
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert page.barriers() == []
