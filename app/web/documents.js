/** The documents of one collection: selection, upload, progress until ready or failed, retry, delete. */
import * as api from "./api.js";
import { announce, byId, confirmed, counted, formatNumber, h } from "./dom.js";
import { Entry } from "./entry.js";

const FACTS_EVERY_MS = 3000, FACTS_LOOKS = 20;
const STORED_COLLECTION = "jamba-rag.collection";
const UPLOADS_AT_ONCE = 2;
const POLL_MS = 700;
const FINDABLE = 10; // documents from which on they can be looked for
const POLLED = 20; // documents at once: they are read oldest first, so those behind are still waiting

/** What a question with “Read what fits best” will read. */
export function describeReading({ reads_whole: readsWhole, fits_context: fits }) {
  if (readsWhole) return "each question reads all of it";
  return `each question reads the best passages${fits ? "" : ": it is too long to be read whole"}`;
}

export class DocumentsPanel {
  constructor({ onOpen, onDeleted, onGone }) {
    Object.assign(this, { onOpen, onDeleted, onGone, collections: [], entries: [], uploads: [], waiting: [], sending: 0, polling: false });
    this.select = byId("collection");
    this.list = byId("document-list");
    this.select.addEventListener("change", () => this.guard(() => this.load()));
    byId("find-document").addEventListener("input", () => this.showList());
    byId("new-collection").addEventListener("click", () => this.toggleForm());
    byId("new-collection-form").addEventListener("submit", (event) => this.guard(() => this.create(event)));
    byId("delete-collection").addEventListener("click", () => this.guard(() => this.dropCollection()));
    for (const [button, input] of [["choose-files", "files"], ["choose-folder", "folder"]]) {
      byId(button).addEventListener("click", () => byId(input).click());
      byId(input).addEventListener("change", ({ target }) => {
        this.add([...target.files]);
        target.value = "";
      });
    }
    byId("new-collection-form").addEventListener("keydown", ({ key }) => key === "Escape" && this.toggleForm(false));
    this.acceptDrops(byId("workspace"));
    for (const [target, type] of [[document, "visibilitychange"], [window, "focus"]]) {
      target.addEventListener(type, () => document.visibilityState === "visible" && this.catchUp());
    }
    addEventListener("beforeunload", (event) => this.uploads.some((entry) => !entry.problem) && event.preventDefault());
  }

  get collection() {
    return this.select.value;
  }

  /** Whether documents of the collection are still being ingested. */
  get isReading() {
    return this.entries.some((entry) => !entry.failure && (entry.active || !entry.document));
  }

  /** Runs an action and shows its error. A background action does not clear an older error. */
  async guard(action, isAsked = true) {
    const error = byId("documents-error");
    if (isAsked) error.hidden = true;
    try {
      await action();
    } catch (problem) {
      error.textContent = problem.message;
      error.hidden = false;
    }
  }

  async start() {
    await this.loadCollections();
    await this.load();
  }

  /** Shows changes by other tabs and users. */
  async catchUp() {
    if (byId("workspace").hidden || this.catchingUp) return;
    this.catchingUp = true;
    await this.guard(async () => {
      const before = this.collection;
      await this.loadCollections();
      await this.load();
      if (this.collection !== before) throw new Error(`The collection ${before} is gone.`);
    }, false);
    this.catchingUp = false;
  }

  /** Aborts running requests, and forgets what was shown. */
  clear() {
    clearTimeout(this.factsTimer);
    for (const entry of this.uploads) entry.cancelling.abort();
    Object.assign(this, { collections: [], entries: [], uploads: [], waiting: [] });
    this.setReadOnly(false);
    sessionStorage.removeItem(STORED_COLLECTION);
    this.select.replaceChildren();
    this.list.replaceChildren();
  }

  /** Preserves the selection, also if changed meanwhile, and across reloads of the page. */
  async loadCollections(wanted = "") {
    const { data, mayAdd } = await api.listCollections();
    this.collections = data;
    byId("new-collection").hidden = !mayAdd;
    if (!mayAdd) this.showForm(false);
    const chosen = wanted || this.collection || sessionStorage.getItem(STORED_COLLECTION);
    this.factsLooks = FACTS_LOOKS;
    const names = this.collections.map((collection) => collection.name);
    if (!names.length) names.push("default");
    if ([...this.select.options].map(({ value }) => value).join() !== names.join()) // a list that is open stays so
      this.select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    this.select.value = names.includes(chosen) ? chosen : names.includes("default") ? "default" : names[0];
    this.showFacts();
  }

  showFacts() {
    this.select.title = this.collection; // may be longer than its room
    byId("question").placeholder = `Ask about ${this.collection === "default" ? "your documents" : this.collection}`;
    const facts = this.collections.find((collection) => collection.name === this.collection);
    byId("delete-collection").disabled = !facts || (this.collection === "default" && !this.entries.length); // it stays
    if (!facts) return void (byId("collection-facts").textContent = "");
    const failed = this.entries.filter((entry) => entry.failure).length;
    const ready = this.entries.filter((entry) => entry.document?.status === "ready").length;
    const counts = [counted(facts.documents, "document"), counted(facts.tokens, "token"), facts.documents > 0 && describeReading(facts)];
    if (facts.state_ready) counts.push("in memory already: the next one starts at once");
    const waiting = [`${formatNumber(ready)} of ${counted(this.entries.length, "document")} ready`]; // the counts come at the end
    const parts = [...(this.isReading ? waiting : counts), failed > 0 && `${formatNumber(failed)} failed`];
    byId("collection-facts").textContent = parts.filter(Boolean).join(" · ");
    clearTimeout(this.factsTimer);
    if (facts.documents && facts.reads_whole && !facts.state_ready && this.factsLooks-- > 0)
      this.factsTimer = setTimeout(() => this.refreshFacts(), FACTS_EVERY_MS);
  }

  /** The service prefetches a collection that fits a few seconds after it has changed. */
  async refreshFacts() {
    await this.guard(async () => {
      this.collections = (await api.listCollections()).data;
      this.showFacts();
    }, false);
  }

  async load() {
    this.showFacts();
    const collection = this.collection;
    if (sessionStorage.getItem(STORED_COLLECTION) !== collection) byId("find-document").value = "";
    sessionStorage.setItem(STORED_COLLECTION, collection);
    const known = this.collections.some(({ name }) => name === collection);
    const shown = this.entries.filter((entry) => entry.document?.collection === collection);
    const { data: documents, mayAdd } = await api.listDocuments(known ? collection : ""); // not known: there is none
    if (collection !== this.collection) return;
    this.setReadOnly(!mayAdd);
    const there = new Map(documents.map((document) => [document.id, document]));
    for (const entry of shown.filter(({ document }) => !there.has(document.id))) {
      this.forget(entry, `${entry.filename} is gone`);
      this.onGone(entry.document.id);
    }
    const kept = this.entries.filter((entry) => entry.document?.collection === collection); // also what has just arrived
    for (const entry of kept) {
      entry.document = there.get(entry.document.id) || entry.document;
      there.delete(entry.document.id);
      entry.show();
    }
    const entries = [...kept, ...[...there.values()].map((document) => new Entry(this, { document }))];
    entries.sort((a, b) => b.document.created_at - a.document.created_at);
    this.entries = [...this.uploads.filter((entry) => entry.collection === collection), ...entries];
    this.showList();
    this.poll();
  }

  /** Hides actions that the service would refuse for this key. */
  setReadOnly(isReadOnly) {
    this.isReadOnly = isReadOnly;
    byId("workspace").classList.toggle("read-only", isReadOnly);
  }

  showList() {
    const focused = document.activeElement;
    const words = byId("find-document").value.toLowerCase().split(/\s+/);
    const found = this.entries.filter((entry) => words.every((word) => entry.words.includes(word)));
    this.list.replaceChildren(...found.map((entry) => entry.element));
    this.showHints();
    (focused.isConnected ? focused : byId("documents-title")).focus({ preventScroll: true }); // a line that was moved loses it
  }

  /** Shows a line whose document may have another status now, by which it is found or no longer. */
  update(entry) {
    const before = entry.words;
    entry.show();
    if (entry.words !== before && byId("find-document").value) this.showList();
  }

  showHints() {
    this.showFacts();
    const isEmpty = !this.entries.length;
    byId("find-document").hidden = this.entries.length < FINDABLE && !byId("find-document").value;
    byId("none-found").hidden = isEmpty || this.list.childElementCount > 0;
    byId("welcome-hint").hidden = isEmpty;
    for (const id of ["no-documents", "formats", "welcome-empty"]) byId(id).hidden = !isEmpty;
  }

  add(files) {
    byId("find-document").value = ""; // what is added is seen
    const entries = files.map((file) => Object.assign(new Entry(this, { file }), { collection: this.collection }));
    this.entries.unshift(...entries);
    this.uploads.unshift(...entries);
    this.waiting.push(...entries);
    this.showList();
    if (entries.length) announce(`${counted(entries.length, "file")} added`);
    this.sendNext();
  }

  sendNext() {
    while (this.sending < UPLOADS_AT_ONCE && this.waiting.length) {
      this.sending += 1;
      this.upload(this.waiting.shift()).finally(() => {
        this.sending -= 1;
        this.sendNext();
      });
    }
  }

  async upload(entry) {
    try {
      const showSent = (sent) => {
        entry.sent = sent;
        entry.show();
      };
      const document = await api.uploadFile(entry.file, entry.collection, showSent, entry.cancelling.signal);
      this.uploads = this.uploads.filter((other) => other !== entry);
      const twin = this.entries.find((other) => other !== entry && other.document?.id === document.id);
      if (twin) this.forget(entry, `${entry.filename} is already here as ${document.filename}`);
      else entry.document = document;
      this.poll();
    } catch (problem) {
      entry.problem = problem;
      this.showFacts();
    }
    this.update(entry);
  }

  /** Polls pending documents until none is left; then refreshes the collection's counts. */
  async poll() {
    if (this.polling) return;
    this.polling = true;
    while (this.entries.some((entry) => entry.active) && !byId("workspace").hidden) {
      const active = this.entries.filter((entry) => entry.active);
      active.sort((a, b) => a.document.created_at - b.document.created_at);
      for (const entry of active.slice(0, POLLED)) await this.refresh(entry);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    this.polling = false;
    if (!byId("workspace").hidden) await this.guard(() => this.loadCollections(), false);
  }

  async refresh(entry) {
    try {
      entry.document = await api.getDocument(entry.document.id);
    } catch (problem) {
      if (problem.status === 404) return this.forget(entry, `${entry.filename} is gone`);
      return; // a broken connection or a busy server: the next round asks again
    }
    this.update(entry);
    if (entry.active) return;
    this.showFacts();
    const ready = [`${entry.filename} is ready`, entry.unread].filter(Boolean).join(". ");
    announce(entry.failure ? `${entry.filename} failed: ${entry.failure}` : ready);
  }

  async retry(entry) {
    const { document } = entry;
    entry.problem = null;
    if (!document) {
      entry.sent = 0;
      this.waiting.push(entry);
      this.update(entry);
      return this.sendNext();
    }
    await this.guardGone(entry, async () => {
      const answer = await api.retryDocument(document.id);
      entry.document = answer?.id ? answer : await api.getDocument(document.id);
      this.update(entry);
      this.poll();
    });
  }

  /** Like `guard`; removes a document from the list if it was deleted elsewhere. */
  async guardGone(entry, action) {
    await this.guard(async () => {
      try {
        await action();
      } catch (problem) {
        if (problem.status !== 404) throw problem;
        this.forget(entry, `${entry.filename} is gone`);
      }
    });
  }

  async remove(entry) {
    if (!entry.document) {
      this.waiting = this.waiting.filter((other) => other !== entry);
      entry.cancelling.abort();
      return this.forget(entry, `${entry.filename} dropped`);
    }
    if (!(await confirmed(`Delete ${entry.filename}? Its text, its passages and everything remembered from it go too.`, "Delete"))) return;
    await this.guardGone(entry, async () => {
      await api.deleteDocument(entry.document.id);
      this.forget(entry, `${entry.filename} deleted`);
      this.onDeleted(entry.document.id);
      await this.loadCollections();
    });
  }

  forget(entry, message) {
    if (entry.element.contains(document.activeElement)) byId("documents-title").focus();
    this.entries = this.entries.filter((other) => other !== entry);
    this.uploads = this.uploads.filter((other) => other !== entry);
    entry.element.remove();
    this.showHints();
    announce(message);
  }

  showForm(open) {
    byId("new-collection-form").hidden = !open;
    byId("new-collection").setAttribute("aria-expanded", String(open));
  }

  toggleForm(open = byId("new-collection-form").hidden) {
    this.showForm(open);
    byId("documents-error").hidden = true; // of a name that was refused
    byId(open ? "collection-name" : "new-collection").focus();
  }

  async create(event) {
    event.preventDefault();
    const name = byId("collection-name").value.trim();
    await api.createCollection(name);
    byId("collection-name").value = "";
    this.toggleForm(false);
    await this.loadCollections(name);
    await this.load();
  }

  async dropCollection() {
    const name = this.collection;
    const count = this.entries.filter((entry) => entry.document).length;
    const all = `Delete ${counted(count, "document")}? The collection default stays, empty.`;
    const whole = `Delete the collection ${name}${count ? ` with ${counted(count, "document")}` : ", which is empty"}?`;
    if (!(await confirmed(name === "default" ? all : whole, "Delete"))) return;
    await api.deleteCollection(name);
    announce(name === "default" ? "All documents deleted" : `Collection ${name} deleted`);
    await this.start();
    this.select.focus(); // the button may be disabled by now
  }

  /** Files can be dropped anywhere; other drags, such as selected text, are left to the browser. */
  acceptDrops(area) {
    const highlight = (on) => byId("dropzone").classList.toggle("over", on);
    const onFiles = (type, act) =>
      area.addEventListener(type, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        if (!this.isReadOnly) act(event);
      });
    onFiles("dragover", () => highlight(true));
    onFiles("dragleave", ({ relatedTarget }) => area.contains(relatedTarget) || highlight(false));
    onFiles("drop", async ({ dataTransfer }) => {
      highlight(false);
      const roots = [...dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
      await this.guard(async () => {
        const unread = [];
        this.add((await Promise.all(roots.map((root) => readEntry(root, unread)))).flat());
        if (!unread.length) return;
        const more = unread.length > 3 ? ` and ${formatNumber(unread.length - 3)} more` : "";
        throw new Error(`${unread.slice(0, 3).join(", ")}${more} could not be read; the other files are added.`);
      });
    });
  }
}

/** The files under one dropped file or folder; paths of what the browser cannot read are added to `unread`. A folder's
    reader gives at most 100 at a time. */
async function readEntry(entry, unread) {
  const reader = entry.isDirectory && entry.createReader();
  const files = [];
  try {
    if (!reader) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
    for (;;) {
      const children = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!children.length) return files;
      files.push(...(await Promise.all(children.map((child) => readEntry(child, unread)))).flat());
    }
  } catch {
    unread.push(entry.fullPath.slice(1));
    return files;
  }
}
