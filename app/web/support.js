/** Finds the sentences of an answer without a quote. The same rule as app/support.py; offsets are in code points. */

// A sentence ends at its mark plus closing quotes or brackets, or with its line; a line ending in a colon continues.
const BOUNDARY = /(?<=[.!?…])["'”’»)\]]*\s+|(?<=[。！？])|(?<![:：\s])\s*\n\s*/gu;

/** `{start, end}` of the sentences of `text` that no quote overlaps. Boundaries inside quotes do not count. */
export function unsupportedSpans(text, quotes) {
  const points = (length) => Array.from(text.slice(0, length)).length;
  const quoted = (from, to) => quotes.some(({ start, end }) => start < to && from < end);
  const edges = [0];
  for (const { 0: boundary, index } of text.matchAll(BOUNDARY)) {
    const [start, end] = [points(index), points(index + boundary.length)];
    if (!quoted(start, end)) edges.push(start + Array.from(boundary.trimEnd()).length, end);
  }
  edges.push(points(text.length));
  const spans = [];
  for (let at = 0; at < edges.length; at += 2) spans.push({ start: edges[at], end: edges[at + 1] });
  const isSaid = ({ start, end }) => /[\p{L}\p{N}]/u.test(Array.from(text).slice(start, end).join(""));
  return spans.filter((span) => isSaid(span) && !quoted(span.start, span.end));
}
