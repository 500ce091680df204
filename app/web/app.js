/** The page: signs in, then connects documents, questions and sources. Start reading here. */
import { session, listCollections } from "./api.js";
import { AskPanel } from "./ask.js";
import { byId } from "./dom.js";
import { DocumentsPanel } from "./documents.js";
import { SourcePanel } from "./source.js";

const source = new SourcePanel();
const documents = new DocumentsPanel({
  onOpen: ({ id, filename }) => source.open({ id, filename }),
  onDeleted: (id) => source.closeIfShowing(id),
  onGone: (id) => source.tellIfGone(id),
});
const questions = new AskPanel({
  onCite: ({ document_id: id, filename, location, cited_text: quote = "" }, opener) =>
    source.open({ id, filename, location, quote }, opener),
  getCollection: () => documents.collection,
  isReading: () => documents.isReading,
  onMissing: () => documents.catchUp(),
});

function showSignIn(message = "") {
  byId("workspace").hidden = true;
  byId("sign-in").hidden = false;
  byId("sign-in-error").textContent = message;
  byId("sign-in-error").hidden = !message;
  byId("key").focus();
}

/** Forgets the key and all data, and aborts running requests, so that none can sign out somebody later. */
function leave(message = "") {
  session.onUnauthorized = () => {};
  session.key = "";
  questions.clear();
  byId("question").value = "";
  source.close();
  documents.clear();
  showSignIn(message);
}

async function showWorkspace() {
  byId("sign-in").hidden = true;
  byId("workspace").hidden = false;
  await documents.guard(() => documents.start());
  byId("question").focus();
}

function showView(name) {
  byId("workspace").dataset.view = name;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === name));
  }
}

async function enter(unknownKey) {
  try {
    await listCollections(); // answers without a key where the service asks for none
  } catch (problem) {
    return showSignIn(problem.status === 401 ? unknownKey : problem.message);
  }
  byId("key").value = "";
  session.onUnauthorized = () => leave("This key is no longer valid.");
  await showWorkspace();
}

byId("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  session.onUnauthorized = () => {};
  session.key = byId("key").value.trim();
  await enter("This key is not known here.");
});

byId("sign-out").addEventListener("click", () => leave());

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => showView(button.dataset.show));
}

byId("add-first").addEventListener("click", () => {
  showView("documents");
  byId("choose-files").focus();
});

questions.restore();
await enter("");
