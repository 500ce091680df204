/** One line in the list of documents. Its actions are in documents.js. */
import { counted, formatBytes, formatNumber, h } from "./dom.js";

const FINISHED = new Set(["ready", "failed"]);
const STAGES = {
  queued: "Waiting",
  parsing: "Reading",
  chunking: "Splitting",
  embedding: "Embedding",
  indexing: "Indexing",
  deleting: "Deleting",
};

/** One line of the list: a file being uploaded, then its Document. Updated in place, to keep the focus. */
export class Entry {
  constructor(panel, { file = null, document = null }) {
    Object.assign(this, { panel, file, document, sent: 0, problem: null, cancelling: new AbortController() });
    this.name = h("span", { class: "name" });
    this.open = h("button", { type: "button", class: "name link", onclick: () => panel.onOpen(this.document), hidden: true });
    this.state = h("span", { class: "state" });
    this.note = h("span", { class: "note", hidden: true });
    this.progress = h("progress", { max: 1, hidden: true });
    this.retry = h("button", { type: "button", onclick: () => panel.retry(this), hidden: true }, "Retry");
    this.remove = h("button", { type: "button", onclick: () => panel.remove(this) });
    const actions = h("span", { class: "actions writes" }, this.retry, this.remove);
    this.element = h("li", {}, this.name, this.open, actions, this.state, this.note, this.progress);
    this.show();
  }

  get filename() {
    return this.document ? this.document.filename : this.file.webkitRelativePath || this.file.name;
  }

  /** The text that the search box matches. */
  get words() {
    const { status } = this.element.dataset;
    return `${this.filename} ${status} ${STAGES[status] || ""}`.toLowerCase();
  }

  get active() {
    return this.document !== null && !FINISHED.has(this.document.status);
  }

  get failure() {
    if (this.problem) return this.problem.message;
    if (this.document?.status !== "failed") return "";
    const { message = "The document could not be read.", page } = this.document.last_error || {};
    return page ? `${message} (page ${page})` : message;
  }

  /** What could not be read of a ready document: scanned pages, files in an archive. */
  get unread() {
    const { status, last_error: gap } = this.document || {};
    return status === "ready" && gap ? `Read only in part: ${gap.message}` : "";
  }

  describe() {
    if (this.failure) return this.failure;
    if (!this.document) return this.sent ? `Sending, ${Math.round(this.sent * 100)} %` : "Waiting to be sent";
    const { status, progress, pages, tokens, bytes, last_error: error } = this.document;
    if (status === "ready") {
      return [pages && counted(pages, "page"), tokens && counted(tokens, "token"), formatBytes(bytes)].filter(Boolean).join(" · ");
    }
    const stage = (STAGES[status] || status) + (status === "queued" && error ? `: ${error.message}` : "");
    return progress?.total ? `${stage}, ${formatNumber(progress.done)} of ${counted(progress.total, progress.unit.replace(/s$/, ""))}` : stage;
  }

  show() {
    const ready = this.document?.status === "ready";
    this.name.textContent = this.open.textContent = this.name.title = this.open.title = this.filename;
    this.name.hidden = ready;
    this.open.hidden = !ready;
    this.state.textContent = this.state.title = this.describe(); // long ones end in what could be read instead
    this.note.textContent = this.unread;
    this.note.hidden = !this.unread;
    this.element.dataset.status = this.failure ? "failed" : this.document?.status || "sending";
    this.progress.hidden = Boolean(this.failure) || ready;
    this.progress.setAttribute("aria-label", `Progress of ${this.filename}`);
    const { done, total } = this.document?.progress || {};
    const share = this.document ? (total ? done / total : null) : this.sent;
    if (share === null) this.progress.removeAttribute("value");
    else this.progress.value = share;
    this.retry.hidden = !this.failure;
    this.retry.setAttribute("aria-label", `Retry ${this.filename}`);
    this.remove.textContent = this.document || this.problem ? "Delete" : "Cancel";
    this.remove.setAttribute("aria-label", `${this.remove.textContent} ${this.filename}`);
  }
}
