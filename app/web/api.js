/** Client of /v1: adds the key, turns problem+json into `Problem`, reads Server-Sent Events. */

const STORED_KEY = "jamba-rag.key";
const MAX_WAITS = 5; // times that one call waits for a busy server before it gives up

/** An error response of the service; `detail` is written for people. */
export class Problem extends Error {
  constructor(status, body, retryAfterS = null) {
    super(body.detail || body.title || `The server answered ${status}.`);
    this.status = status;
    this.code = body.code || "";
    this.requestId = body.request_id || "";
    this.retryAfterS = retryAfterS;
  }
}

export const session = {
  get key() {
    return sessionStorage.getItem(STORED_KEY) || "";
  },
  set key(value) {
    if (value) sessionStorage.setItem(STORED_KEY, value);
    else sessionStorage.removeItem(STORED_KEY);
  },
  onUnauthorized: () => {},
};

function parseProblem(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}

function problemOf(status, text, retryAfter) {
  const problem = new Problem(status, parseProblem(text), Number(retryAfter) || null);
  if (status === 401) session.onUnauthorized();
  return problem;
}

function authorization() {
  return session.key ? { Authorization: `Bearer ${session.key}` } : {};
}

/** Runs `action`; replaces the browsers' differing and vague messages for network failures with ours. */
async function reach(action) {
  try {
    return await action();
  } catch (problem) {
    throw problem instanceof TypeError ? new Error("The service cannot be reached: is it running, and are you online?") : problem;
  }
}

/** A successful Response; anything else is thrown as Problem. Paths are relative, so the page works behind a path prefix. */
async function request(path, { method = "GET", json, signal, prefer } = {}) {
  const headers = authorization();
  if (prefer) headers.Prefer = prefer;
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const body = json === undefined ? undefined : JSON.stringify(json);
  const response = await reach(() => fetch(path, { method, headers, body, signal }));
  if (!response.ok) throw problemOf(response.status, await response.text(), response.headers.get("Retry-After"));
  return response;
}

const readJson = async (path, options) => (await request(path, options)).json();
const documentPath = (id) => `v1/documents/${encodeURIComponent(id)}`;
const collectionPath = (name) => `v1/collections/${encodeURIComponent(name)}`;

/** The JSON of a list, and whether this key may add to it (`mayAdd`). */
async function readList(path) {
  const response = await request(path);
  const allowed = response.headers.get("Allow");
  return { ...(await response.json()), mayAdd: !allowed || /\bPOST\b/.test(allowed) };
}

export const listCollections = () => readList("v1/collections");
export const createCollection = (name) => readJson("v1/collections", { method: "POST", json: { name } });
export const deleteCollection = (name) => request(collectionPath(name), { method: "DELETE" });
export const getDocument = (id) => readJson(documentPath(id));
export const retryDocument = (id) => readJson(`${documentPath(id)}/retry`, { method: "POST" });
export const deleteDocument = (id) => request(documentPath(id), { method: "DELETE" });
export const getFile = async (id) => (await request(`${documentPath(id)}/file`)).blob();
export const getText = (id, start, end) => readJson(`${documentPath(id)}/text?start=${start}&end=${end}`);

/** A page of a PDF with a passage highlighted: `{blob, boxes}`; a box is [left, top, width, height] in fractions. */
export async function getPageImage(id, page, start, end) {
  const response = await request(`${documentPath(id)}/pages/${page}/image?start=${start}&end=${end}`);
  const boxes = (response.headers.get("Highlight-Boxes") || "").split(", ").filter(Boolean);
  return { blob: await response.blob(), boxes: boxes.map((box) => box.split(" ").map(Number)) };
}

/** All documents of a collection ("": of all collections), fetched 1,000 at a time: `{data, mayAdd}`. */
export async function listDocuments(collection) {
  const documents = [];
  for (let after = ""; ; after = documents.at(-1).id) {
    const query = new URLSearchParams({ limit: "1000", ...(collection && { collection }), ...(after && { after }) });
    const page = await readList(`v1/documents?${query}`);
    documents.push(...page.data);
    if (!page.has_more || !page.data.length) return { data: documents, mayAdd: page.mayAdd };
  }
}

function send(file, collection, onProgress, signal) {
  const form = new FormData();
  form.append("collection", collection);
  form.append("file", file, file.name);
  const upload = new XMLHttpRequest(); // fetch cannot report how much has been sent
  upload.open("POST", "v1/documents");
  for (const [name, value] of Object.entries(authorization())) upload.setRequestHeader(name, value);
  upload.upload.addEventListener("progress", (event) => event.lengthComputable && onProgress(event.loaded / event.total));
  return new Promise((resolve, reject) => {
    upload.addEventListener("error", () => reject(new Error("The connection broke before the file was sent.")));
    upload.addEventListener("abort", () => reject(signal.reason));
    signal.addEventListener("abort", () => upload.abort());
    upload.addEventListener("load", () => {
      if (upload.status < 300) resolve(JSON.parse(upload.responseText));
      else reject(problemOf(upload.status, upload.responseText, upload.getResponseHeader("Retry-After")));
    });
    upload.send(form);
  });
}

/** Uploads one file and returns its Document; waits and tries again while the server says that it is busy. Rejects with
 * the signal's reason once it is aborted. */
export async function uploadFile(file, collection, onProgress, signal) {
  for (let waits = 0; ; waits += 1) {
    signal.throwIfAborted();
    try {
      const { data, errors } = await send(file, collection, onProgress, signal);
      if (errors.length) throw new Problem(422, errors[0]);
      return data[0];
    } catch (error) {
      if (error.status !== 429 || waits === MAX_WAITS) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfterS || 2)));
    }
  }
}

function parseEvent(block) {
  const event = { type: "message", data: "" };
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([a-z]*):? ?(.*)$/s.exec(line) || [];
    if (field === "event") event.type = value;
    if (field === "data") event.data += (event.data && "\n") + value;
  }
  return event.data ? { type: event.type, data: JSON.parse(event.data) } : null;
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { value, done } = await reach(() => reader.read());
    if (done) return;
    const blocks = (buffer + value).split(/\r?\n\r?\n/);
    buffer = blocks.pop();
    for (const event of blocks.map(parseEvent)) if (event) yield event;
  }
}

/** The events of an answer as `{type, data}`. Parsed here, because EventSource cannot send a key. */
export async function* streamAnswer(body, signal) {
  const json = { ...body, stream: true };
  const response = await request("v1/answers", { method: "POST", json, signal, prefer: "progress" });
  yield* readEvents(response.body);
}
