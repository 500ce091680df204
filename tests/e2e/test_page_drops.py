"""Files and folders dropped onto the page, as the browser delivers them from a desktop; Retry after a failure."""

from pathlib import Path

from tests.e2e.browser import IN_CHROMIUM, Page

pytestmark = IN_CHROMIUM

# remembers every state that a line of the list was in
WATCH = """
window.states = [];
new MutationObserver((changes) => changes.forEach(({ target }) => window.states.push(target.dataset.status)))
  .observe(document.getElementById("document-list"), { subtree: true, attributeFilter: ["data-status"] });
"""


def drag(page: Page, steps: str, *paths: Path) -> None:
    """`steps` of a drag of these files and folders over the middle of the page."""
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in steps.split():
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 400, "y": 400, "data": data})


def retry(page: Page, name: str) -> None:
    page.find(f"button[aria-label='Retry {name}']").click()


def test_files_and_a_folder_are_dropped_and_asked(page, tmp_path, handbook):
    folder = tmp_path / "island"
    (folder / "deep" / "empty").mkdir(parents=True)
    many = [folder / f"{number}.txt" for number in range(3)] + [folder / "deep" / "boats.txt"]
    for path in many:
        path.write_text(f"This is the log of {path.stem}. The weather was fair.")
    drag(page, "dragEnter dragOver", handbook, folder)
    assert "over" in page.find("#dropzone").get_attribute("class").split()
    drag(page, "drop", handbook, folder)
    page.wait(lambda: "5 documents" in page.find("#collection-facts").text)
    page.wait(lambda: {page.status(path.name) for path in (handbook, *many)} == {"ready"})
    assert "over" not in page.find("#dropzone").get_attribute("class").split()
    assert page.ask("When is the lamp trimmed?").find_elements("css selector", ".cite")


def test_a_folder_of_more_files_than_the_browser_names_at_once_comes_whole(page, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(103):
        (folder / f"{number}.txt").write_text(f"Page {number} of the log.")
    with page.offline():  # none needs to arrive
        drag(page, "dragEnter dragOver drop", folder)
        page.wait(
            lambda: len(page.driver.find_elements("css selector", "#document-list li[data-status=failed]")) == 103
        )


# what a browser gives for a folder of two files, of which one is gone when it is read
HALF_READABLE = """
DataTransferItem.prototype.webkitGetAsEntry = () => {
  const log = new File(["The weather was fair."], "log.txt");
  const children = [
    { isDirectory: false, fullPath: "/island/lost.txt", file: (give, fail) => fail(new DOMException("gone")) },
    { isDirectory: false, fullPath: "/island/log.txt", file: (give) => give(log) },
  ];
  const createReader = () => ({ readEntries: (give) => give(children.splice(0)) });
  return { isDirectory: true, fullPath: "/island", createReader };
};
"""


def test_a_file_that_cannot_be_read_does_not_keep_the_others_out(page, tmp_path):
    page.driver.execute_script(HALF_READABLE)
    drag(page, "dragEnter dragOver drop", tmp_path)
    page.wait(lambda: page.status("log.txt") == "ready")
    assert "island/lost.txt could not be read; the other files are added." in page.find("#documents-error").text


def test_dragged_text_is_no_file(page):
    text = {"items": [{"mimeType": "text/plain", "data": "words"}], "files": [], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 400, "y": 400, "data": text})
    assert "over" not in page.find("#dropzone").get_attribute("class").split()
    assert not page.find_all("#document-list li") and not page.find_all("#documents-error")


def test_a_file_that_did_not_get_through_is_sent_again(page, handbook):
    with page.offline():
        page.add(handbook)
        assert page.status(handbook.name) == "failed" and "connection broke" in page.line(handbook.name).text
    retry(page, handbook.name)
    page.wait(lambda: page.status(handbook.name) == "ready")
    assert not page.find_all(f"button[aria-label='Retry {handbook.name}']")
    assert page.ask("When is the lamp trimmed?").find_elements("css selector", ".cite")


def test_a_document_that_failed_is_read_again_and_says_why_it_failed_again(page, tmp_path):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7\nthis is no PDF at all\n" * 20)
    page.add(broken)
    reason = page.line(broken.name).text
    page.driver.execute_script(WATCH)
    retry(page, broken.name)
    page.wait(lambda: page.driver.execute_script("return window.states.at(-1)") == "failed")
    assert page.driver.execute_script("return window.states[0]") in ("queued", "parsing")
    assert page.line(broken.name).text == reason and len(page.find_all("#document-list li")) == 1
    assert page.find_all(f"button[aria-label='Retry {broken.name}']")
