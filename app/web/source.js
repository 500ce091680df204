/** Shows a document beside the answer with one passage marked: pages of a PDF as pictures, all else as text. Of a text it
 * reads only a window around the passage. */
import * as api from "./api.js";
import { byId, formatPages, h } from "./dom.js";

const MAX_PAGES = 3; // of a passage that are shown as pictures
const READABLE_WIDTH = 420; // CSS pixels of a page; in less room it is shown larger than the room
const WINDOW = 6000; // characters read before and after what is shown

/** `text` between two offsets in code points, as used by the service (JavaScript counts UTF-16 units). */
export const sliceText = (text, start, end) => Array.from(text).slice(start, end).join("");

export class SourcePanel {
  constructor() {
    this.element = byId("source");
    this.request = 0;
    this.opener = null;
    this.pictures = []; // {page, url, boxes} of the pages that are shown, empty while it's the text
    byId("source-view").addEventListener("click", () => (this.pictures.length ? this.showText() : this.showPages(true)));
    byId("source-zoom").addEventListener("click", () => this.zoom(byId("source-zoom").getAttribute("aria-pressed") !== "true"));
    byId("source-close").addEventListener("click", () => this.close());
    byId("source-download").addEventListener("click", () => this.download());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.element.hidden && !byId("confirm").open) this.close();
    });
  }

  /** `location` has the passage's pages, char_start and char_end; without it the text opens at its beginning. */
  async open({ id, filename, location = null, quote = "" }, opener = document.activeElement) {
    Object.assign(this, { id, filename, location, quote, opener });
    byId("source-title").textContent = filename;
    const headings = location?.heading_path?.length ? ` · ${location.heading_path.join(" › ")}` : "";
    byId("source-place").textContent = location ? `${formatPages(location)}${headings}`.replace(/^ · /, "") : "";
    this.empty();
    byId("source-error").hidden = byId("source-view").hidden = true;
    byId("source-text").append(h("p", { class: "hint waiting" }, "Opening…"));
    this.element.hidden = false;
    byId("workspace").classList.add("with-source");
    if (!location?.page_start || !(await this.showPages())) await this.showText();
  }

  async showText() {
    this.empty();
    byId("source-view").textContent = "Page";
    const start = Math.max(0, (this.location?.char_start ?? 0) - WINDOW);
    await this.load(start, (this.location?.char_end ?? 0) + WINDOW);
    (byId("source-text").querySelector("mark") || byId("source-title")).focus({ preventScroll: true });
  }

  /** Shows the passage's pages as pictures; false when there are none or the passage isn't found on them. Then, as on a
   * scan, the text has the mark and the pages can be chosen (`unmarked`). */
  async showPages(unmarked = false) {
    const { page_start: first, page_end: last, char_start: start, char_end: end } = this.location;
    const pages = Array.from({ length: Math.min(MAX_PAGES, (last || first) - first + 1) }, (_, index) => first + index);
    const request = (this.request += 1);
    let images;
    try {
      images = await Promise.all(pages.map((page) => api.getPageImage(this.id, page, start, end)));
    } catch {
      return request !== this.request; // the text then says what is wrong, if it is more than the picture
    }
    if (request !== this.request) return true; // something else was opened meanwhile
    byId("source-view").hidden = false;
    if (!unmarked && !images.some((image) => image.boxes.length)) return false;
    this.empty();
    this.pictures = images.map(({ blob, boxes }, index) => ({ page: pages[index], url: URL.createObjectURL(blob), boxes }));
    byId("source-view").textContent = "Text";
    byId("source-zoom").hidden = false;
    const marked = this.quote ? `Marked on it: ${this.quote}` : "The passage is marked on it.";
    const alt = ({ page, boxes }) => `Page ${page}${boxes.length ? `. ${marked}` : ""}`;
    const nodes = this.pictures.map((picture) => h("img", { class: "page-image", src: picture.url, alt: alt(picture) }));
    byId("source-text").append(...nodes);
    byId("source-text").focus({ preventScroll: true });
    await Promise.all(nodes.map((image) => image.decode().catch(() => {})));
    this.zoom(byId("source-text").clientWidth < READABLE_WIDTH);
    return true;
  }

  scrollToMark() {
    const view = byId("source-text");
    const index = this.pictures.findIndex(({ boxes }) => boxes.length);
    const image = view.children[index];
    if (!image) return;
    const [left, top] = this.pictures[index].boxes[0];
    const [inner, outer] = [image.getBoundingClientRect(), view.getBoundingClientRect()];
    view.scrollBy(inner.left - outer.left + left * inner.width - outer.width / 4, inner.top - outer.top + top * inner.height - outer.height / 3);
  }

  zoom(isLarge) {
    byId("source-zoom").setAttribute("aria-pressed", String(isLarge));
    byId("source-text").classList.toggle("large", isLarge);
    this.scrollToMark();
  }

  empty() {
    for (const { url } of this.pictures) URL.revokeObjectURL(url);
    this.pictures = [];
    byId("source-zoom").hidden = true;
    byId("source-text").replaceChildren();
  }

  async load(start, end) {
    const request = (this.request += 1);
    byId("source-error").hidden = true;
    try {
      const body = await api.getText(this.id, start, end);
      if (request === this.request) this.show(body, start, end);
    } catch (problem) {
      if (request !== this.request) return;
      this.empty();
      this.fail(problem);
    }
  }

  fail(problem) {
    byId("source-error").textContent = problem.status === 404 ? "This document has been deleted." : problem.message;
    byId("source-error").hidden = false;
  }

  show({ text, pages = [] }, start, end) {
    const points = Array.from(text);
    const [from, to] = this.location ? [this.location.char_start - start, this.location.char_end - start] : [0, 0];
    const starts = new Map(pages.filter((page) => page.char_start >= start).map((page) => [page.char_start - start, page]));
    const cuts = [...new Set([0, from, to, points.length, ...starts.keys()])].filter((cut) => cut >= 0 && cut <= points.length);
    cuts.sort((a, b) => a - b);
    const nodes = [];
    cuts.forEach((cut, index) => {
      const page = starts.get(cut);
      if (page) nodes.push(h("span", { class: "page" }, page.label ? `Page ${page.page} (${page.label})` : `Page ${page.page}`));
      const piece = points.slice(cut, cuts[index + 1]).join("");
      if (index + 1 < cuts.length) nodes.push(cut >= from && cut < to ? h("mark", { tabindex: "-1" }, piece) : piece);
    });
    if (start > 0) nodes.unshift(this.more("Show what comes before", Math.max(0, start - WINDOW), end));
    if (points.length >= end - start) nodes.push(this.more("Show what follows", start, end + WINDOW));
    byId("source-text").replaceChildren(...nodes);
    byId("source-text").querySelector("mark")?.scrollIntoView({ block: "center" });
  }

  more(label, start, end) {
    return h("button", { type: "button", class: "more", onclick: () => this.load(start, end) }, label);
  }

  /** Downloads the original; it is never opened in the page. */
  async download() {
    const { id, filename } = this;
    try {
      const url = URL.createObjectURL(new Blob([await api.getFile(id)], { type: "application/octet-stream" }));
      h("a", { href: url, download: filename }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    } catch (problem) {
      this.fail(problem);
    }
  }

  close() {
    this.request += 1;
    this.empty();
    this.element.hidden = true;
    byId("workspace").classList.remove("with-source");
    if (this.opener?.isConnected) this.opener.focus();
  }

  /** The document was deleted elsewhere: hides all of it. */
  tellIfGone(id) {
    if (this.element.hidden || this.id !== id) return;
    this.request += 1;
    this.empty();
    this.fail({ status: 404 });
  }

  closeIfShowing(id) {
    if (!this.element.hidden && this.id === id) this.close();
  }
}
