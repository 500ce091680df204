/** Builds elements and asks for confirmation. Text is always inserted as text; external markup is never parsed. */

/** `h("p", {class: "hint", hidden: true}, "text", child)`; functions become listeners (`onclick`), `false` and `null` are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Announces `text` to screen readers without moving the focus. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Resolves to true if the user agrees; restores the focus. */
export function confirmed(question, action) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  byId("confirm-yes").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

const NUMBER = new Intl.NumberFormat("en");
const UNITS = ["bytes", "KB", "MB", "GB"];

export const formatNumber = (value) => NUMBER.format(value);

export function formatBytes(bytes) {
  let [value, unit] = [bytes, 0];
  while (value >= 999.5 && unit < UNITS.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

export const formatDuration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

export const formatWait = (seconds) => (seconds < 100 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`);

export const counted = (count, noun) => `${formatNumber(count)} ${noun}${count === 1 ? "" : "s"}`;

/** "page 3", "pages 3–4" or "" for a location, preceded by `separator`. */
export function formatPages(location, separator = "") {
  if (!location || location.page_start === null || location.page_start === undefined) return "";
  const { page_start: first, page_end: last } = location;
  return separator + (last && last !== first ? `pages ${first}–${last}` : `page ${first}`);
}
