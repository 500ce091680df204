/** Shows a document's text beside the answer, with one passage marked. Reads only a window of it around the passage. */
import * as api from "./api.js";
import { byId, formatPages, h } from "./dom.js";

const WINDOW = 6000; // characters read before and after what is shown

/** `text` between two offsets in code points, which is how the service counts (JavaScript counts UTF-16 units). */
export const sliceText = (text, start, end) => Array.from(text).slice(start, end).join("");

export class SourcePanel {
  constructor() {
    this.element = byId("source");
    this.request = 0;
    this.opener = null;
    byId("source-close").addEventListener("click", () => this.close());
    byId("source-download").addEventListener("click", () => this.download());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.element.hidden && !byId("confirm").open) this.close();
    });
  }

  /** `location` gives the passage's char_start and char_end; without it the document opens at its beginning. */
  async open({ id, filename, location = null }, opener = document.activeElement) {
    Object.assign(this, { id, filename, location, opener });
    byId("source-title").textContent = filename;
    const headings = location?.heading_path?.length ? ` · ${location.heading_path.join(" › ")}` : "";
    byId("source-place").textContent = location ? `${formatPages(location)}${headings}`.replace(/^ · /, "") : "";
    byId("source-text").replaceChildren();
    this.element.hidden = false;
    byId("workspace").classList.add("with-source");
    const start = Math.max(0, (location?.char_start ?? 0) - WINDOW);
    await this.load(start, (location?.char_end ?? 0) + WINDOW);
    (byId("source-text").querySelector("mark") || byId("source-title")).focus({ preventScroll: true });
  }

  async load(start, end) {
    const request = (this.request += 1);
    const error = byId("source-error");
    error.hidden = true;
    try {
      const body = await api.getText(this.id, start, end);
      if (request === this.request) this.show(body, start, end);
    } catch (problem) {
      error.textContent = problem.status === 404 ? "This document has been deleted." : problem.message;
      error.hidden = false;
    }
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

  /** Saves the original; it is never opened in the page. */
  async download() {
    const url = URL.createObjectURL(new Blob([await api.getFile(this.id)], { type: "application/octet-stream" }));
    h("a", { href: url, download: this.filename }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  close() {
    this.request += 1;
    this.element.hidden = true;
    byId("workspace").classList.remove("with-source");
    if (this.opener?.isConnected) this.opener.focus();
  }

  closeIfShowing(id) {
    if (!this.element.hidden && this.id === id) this.close();
  }
}
