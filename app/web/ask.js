/** A conversation: streams each answer, numbers its citations, says clearly if the documents have no answer. */
import * as api from "./api.js";
import { announce, byId, counted, formatDuration, formatNumber, formatPages, formatWait, h } from "./dom.js";
import { sliceText } from "./source.js";
import { unsupportedSpans } from "./support.js";

const STORED_THREAD = "jamba-rag.thread";
const KEPT_TURNS = 20;
const SENT_TURNS = 6; // earlier ones that go along with a follow-up
const NEAREST = 3;
const LONG_QUESTION = 1000; // characters, from which on it is shown in a box that scrolls
const NOT_AS_IT_IS = [413, 422]; // what the service says to a question that must be changed
const NOT_FOUND = "This is not in your documents.";
const STILL_READING = "Some documents of this collection were still being read: ask again when they are ready.";
const UNSUPPORTED = "Dotted words have no quote in their sentence: nobody checked them.";
const CLOSING_MARKS = "”’»\"";
const ROW = / \| /; // of a table, as the service writes it
const AROUND = 120; // characters shown before and after a quote
const TIERS = { gpu: "GPU", host: "memory", redis: "Redis" };

/** Describes the data of `answer.progress`, before the first word of an answer. */
export function describeProgress(progress) {
  if (progress?.stage === "waiting") return "Waiting for its turn: other questions are being answered…";
  if (progress?.stage === "writing") return "All is read; writing the answer…";
  if (!progress?.done) return "Reading…";
  const left = progress.seconds_left === null ? "" : `, about ${formatWait(progress.seconds_left)} left`;
  return `Reading: ${formatNumber(progress.done)} of ${formatNumber(progress.total)} tokens${left}`;
}

/** The line or lines of a text that contain the span between two offsets in code points. */
const lineAt = (text, start, end) => sliceText(text, 0, start).split("\n").at(-1) + sliceText(text, start, end) + sliceText(text, end).split("\n")[0];

/** The text as one paragraph, except for table rows. */
const keepRows = (text) => text.replace(/([^\n]*)\n+(?=([^\n]*))/g, (_, line, next) => line + (ROW.test(line) || ROW.test(next) ? "\n" : " "));

/** The text of a passage without its heading, which is shown above it. */
export function withoutHeading({ text, location }) {
  const heading = location?.heading_path?.at(-1);
  const bare = text.replace(/^[#*\s]+/, "");
  const rest = heading && bare.startsWith(heading) ? bare.slice(heading.length) : "";
  return rest.match(/^[#* \t]*\n[*\s]*([^]+)/)?.[1] || text; // else it is the beginning of a sentence
}

/** One question and its answer so far. */
class Turn {
  constructor(panel, { question, collection, answer = null }) {
    Object.assign(this, { panel, question, collection, answer, text: "", citations: [], sources: [], frame: 0, asked: performance.now() });
    this.body = h("div", { class: "answer", "aria-busy": "true" });
    this.footer = h("div", { class: "footer" });
    this.element = h("article", { class: "turn" }, h("h3", question.length > LONG_QUESTION ? { class: "long", tabindex: "0" } : {}, question), this.body, this.footer);
    if (answer) this.finish(answer);
  }

  apply({ type, data }) {
    if (type === "answer.sources") this.sources = data.sources;
    if (type === "answer.text.delta") {
      this.wordsAfter ??= performance.now() - this.asked;
      this.text += data.text;
    }
    if (type === "answer.citation.added") this.citations.push(data.citation || data);
    if (type === "answer.progress") return this.showProgress(data);
    if (type === "answer.completed") return this.finish(data.answer || data);
    if (type === "answer.error") throw new Error(data.detail || data.title || "The answer broke off.");
    if (this.text && !this.frame) this.frame = requestAnimationFrame(() => this.showText());
  }

  showProgress(progress = null) {
    if (!this.bar?.isConnected) {
      this.waiting = h("p", { class: "hint waiting" });
      this.bar = h("progress", { "aria-label": "Read by the model" });
      this.body.replaceChildren(this.waiting, this.bar);
    }
    this.waiting.textContent = describeProgress(progress);
    if (progress?.stage === "reading" && progress.done) Object.assign(this.bar, { max: progress.total, value: progress.done });
    else this.bar.removeAttribute("value"); // then it only moves
  }

  showText() {
    this.frame = 0;
    const cited = this.citations.map((citation, index) => {
      const isQuoted = CLOSING_MARKS.includes(sliceText(this.text, citation.end, citation.end + 1) || " ");
      return { ...citation, end: citation.end + (isQuoted ? 1 : 0), button: this.citeButton(citation, index + 1) };
    });
    const spans = [...cited, ...this.unsupported].sort((a, b) => a.end - b.end); // they don't overlap
    const nodes = [];
    let position = 0;
    for (const { start, end, button } of spans) {
      const words = sliceText(this.text, start, end);
      nodes.push(sliceText(this.text, position, start), ...(button ? [words, button] : [h("span", { class: "unsupported" }, words)]));
      position = end;
    }
    nodes.push(sliceText(this.text, position));
    this.body.replaceChildren(...nodes);
  }

  /** The sentences without a quote, of a complete answer with quotes; otherwise none. */
  get unsupported() {
    return this.answer?.citations.length ? unsupportedSpans(this.text, this.citations) : [];
  }

  citeButton(citation, number) {
    const label = `Citation ${number}: ${citation.filename}${formatPages(citation.location, ", ")}`;
    return h("button", { type: "button", class: "cite", "aria-label": label, onclick: ({ target }) => this.panel.onCite(citation, target) }, `${number}`);
  }

  finish(answer) {
    cancelAnimationFrame(this.frame);
    this.answer = answer;
    this.text = answer.text;
    this.citations = [...answer.citations].sort((a, b) => a.end - b.end);
    this.sources = answer.sources;
    this.body.setAttribute("aria-busy", "false");
    if (answer.grounding === "not_found") this.showNotFound();
    else this.showAnswer();
    this.footer.append(this.measures());
  }

  showAnswer() {
    this.showText();
    const entries = this.citations.map((citation, index) => this.passage(citation, this.excerpt(citation), `${index + 1}`));
    this.footer.replaceChildren(h("ol", { class: "passages", "aria-label": "Citations" }, ...entries));
    if (this.unsupported.length) this.footer.prepend(h("p", { class: "hint" }, UNSUPPORTED));
    this.sayIfEarly();
    announce(`Answered with ${counted(entries.length, "citation")}.`);
  }

  showNotFound() {
    const said = this.answer.usage.input_tokens ? NOT_FOUND : this.answer.text; // there are no documents
    this.body.replaceChildren(h("p", { class: "not-found" }, said));
    const entries = this.sources.slice(0, NEAREST).map((source) => this.passage(source, [h("span", { class: "quote" }, keepRows(withoutHeading(source)))], "≈"));
    const nearest = entries.length > 0 && h("p", { class: "hint" }, "The nearest passages, in case the question was meant differently:");
    this.footer.replaceChildren(...(nearest ? [nearest, h("ol", { class: "passages", "aria-label": "Nearest passages" }, ...entries)] : []));
    this.sayIfEarly();
    announce(said);
  }

  sayIfEarly() {
    if (this.answeredEarly) this.footer.prepend(h("p", { class: "hint" }, STILL_READING));
  }

  /** The quote with the words around it, if its passage is among the sources. */
  excerpt({ chunk_id: id, cited_text: quote, location }) {
    const words = h("span", { class: "quote" }, quote);
    const source = this.sources.find(({ chunk_id: other }) => other === id);
    if (!source) return [words];
    const [start, end] = [location.char_start, location.char_end].map((at) => at - source.location.char_start);
    const [inTable, above, below] = [ROW.test(lineAt(source.text, start, end)), sliceText(source.text, 0, start), sliceText(source.text, end)];
    const before = above.split(inTable ? "\n" : /\n{2,}/).at(-1); // a row names its columns
    const after = below.split(inTable ? "\n" : /\n{2,}/)[0];
    const [first, last] = [sliceText(before, -AROUND), sliceText(after, 0, AROUND)];
    const beginning = first === before ? first : `… ${first.replace(/^\S+\s+/, "")}`; // whole words only
    return [beginning, words, last === after ? last : `${last.replace(/\s+\S+$/, "")} …`];
  }

  passage(place, words, mark) {
    const heading = place.location?.heading_path?.at(-1);
    const where = h("span", { class: "where" }, `${place.filename}${formatPages(place.location, ", ")}${heading ? ` · ${heading}` : ""}`);
    const button = h(
      "button",
      { type: "button", class: "passage", onclick: ({ currentTarget }) => this.panel.onCite(place, currentTarget) },
      h("span", { class: "mark", "aria-hidden": "true" }, mark),
      h("span", { class: "words" }, where, h("span", { class: words.length > 1 ? "excerpt around" : "excerpt" }, ...words)),
    );
    return h("li", {}, button);
  }

  measures() {
    const { timings, usage, cache, truncated } = this.answer;
    const cached = usage.cached_input_tokens;
    const tier = TIERS[cache?.tier] ? ` (${TIERS[cache.tier]})` : "";
    const read = usage.input_tokens > 0;
    const words = this.wordsAfter !== undefined && `first words after ${formatDuration(this.wordsAfter)}`;
    const parts = [
      read && timings && `First token after ${formatDuration(timings.ttft_ms)}`, // words are shown once it is known which quote is best
      read && words,
      read ? `${formatNumber(cached)} of ${formatNumber(usage.input_tokens)} prompt tokens from the cache${cached ? tier : ""}` : "No document was read",
      truncated && "cut off at the length limit",
      this.collection !== "default" && `collection ${this.collection}`,
    ];
    return h("p", { class: "measures" }, parts.filter(Boolean).join(" · "));
  }

  /** Says why the answer is missing or incomplete, and offers to ask again. */
  stop(message, isError) {
    cancelAnimationFrame(this.frame);
    this.showText();
    this.body.setAttribute("aria-busy", "false");
    const again = h("button", { type: "button", onclick: () => this.panel.ask(this.question, this.collection) }, "Ask again");
    const note = h("p", isError ? { class: "error", role: "alert" } : { class: "hint" }, message);
    this.footer.replaceChildren(h("div", { class: "row" }, note, again));
  }
}

export class AskPanel {
  constructor({ onCite, getCollection, isReading, onMissing }) {
    Object.assign(this, { onCite, getCollection, isReading, onMissing, turns: [], running: null });
    this.field = byId("question");
    this.button = byId("ask-button");
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.ask(this.field.value.trim());
    });
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) byId("ask-form").requestSubmit();
    });
    byId("clear-thread").addEventListener("click", () => this.clear());
  }

  /** Restores the questions of this tab; one interrupted by a reload can be asked again. */
  restore() {
    for (const stored of JSON.parse(sessionStorage.getItem(STORED_THREAD) || "[]")) {
      const turn = this.append(new Turn(this, stored));
      if (!stored.answer) turn.stop("The page was reloaded before the answer was complete.", false);
    }
  }

  save() {
    const kept = this.turns.slice(-KEPT_TURNS).map(({ question, collection, answer }) => ({ question, collection, answer }));
    try {
      sessionStorage.setItem(STORED_THREAD, JSON.stringify(kept));
    } catch {
      sessionStorage.removeItem(STORED_THREAD); // over the browser's quota: a reload then forgets, nothing else breaks
    }
  }

  /** The conversation about this collection, ending with `question`, in the form of the API. */
  messages(question, collection) {
    const before = this.turns.filter((turn) => turn.answer && turn.collection === collection).slice(-SENT_TURNS);
    const said = before.flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.answer.text.trim() || NOT_FOUND },
    ]);
    return [...said, { role: "user", content: question }];
  }

  append(turn) {
    this.turns.push(turn);
    byId("thread").append(turn.element);
    byId("welcome").hidden = true;
    byId("clear-thread").hidden = false;
    return turn;
  }

  clear() {
    this.running?.abort();
    for (const turn of this.turns) turn.element.remove();
    this.turns = [];
    sessionStorage.removeItem(STORED_THREAD);
    byId("welcome").hidden = false;
    byId("clear-thread").hidden = true;
    this.field.focus();
  }

  async ask(question, collection = this.getCollection()) {
    if (!question || this.running) return;
    const messages = this.messages(question, collection);
    const turn = this.append(new Turn(this, { question, collection }));
    turn.answeredEarly = collection === this.getCollection() && this.isReading();
    this.save();
    this.field.value = "";
    this.running = new AbortController();
    this.button.textContent = "Stop";
    turn.showProgress();
    turn.element.scrollIntoView({ block: "end" });
    try {
      const body = { messages, collections: [collection], mode: byId("mode").value };
      for await (const event of api.streamAnswer(body, this.running.signal)) turn.apply(event);
      if (!turn.answer) throw new Error("The connection broke before the answer was complete.");
    } catch (problem) {
      if (problem.name === "AbortError") turn.stop("Stopped.", false);
      else turn.stop(problem.message, true);
      if (NOT_AS_IT_IS.includes(problem.status)) this.field.value ||= question;
      if (problem.status === 404) this.onMissing();
    }
    this.running = null;
    this.button.textContent = "Ask";
    this.save();
    turn.element.scrollIntoView({ block: "nearest" });
  }
}
