// Elements, numbers for people, and tables whose rows stay the same elements, so that focus and scrolling stay.

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Sets a text only where it changed: nothing else is laid out, or read out, anew.
export function cell(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export const count = (value) => Math.round(value).toLocaleString("en");
export const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "-");
export const seconds = (value) => (value < 1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);
export const shortId = (id, length = 12) => (id.length > length ? `${id.slice(0, length)}…` : id);

export function ago(value_s) {
  if (value_s < 1) return "now";
  if (value_s < 120) return `${Math.round(value_s)} s ago`;
  return value_s < 7200 ? `${Math.round(value_s / 60)} min ago` : `${Math.round(value_s / 3600)} h ago`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at += 1) value /= 1024;
  return `${value.toFixed(at && value < 100 ? 1 : 0)} ${units[at]}`;
}

// Shows `items` as rows of `body`: `cellsOf(item)` gives a cell each, the first with `head`. Rows are kept by `keyOf`.
export function rows(body, items, keyOf, cellsOf, finish = () => {}) {
  const before = new Map([...body.children].map((row) => [row.dataset.key, row]));
  let at = null;
  for (const item of items) {
    const key = keyOf(item);
    const row = before.get(key) || element("tr");
    before.delete(key);
    row.dataset.key = key;
    fill(row, cellsOf(item));
    finish(row, item);
    const next = at ? at.nextSibling : body.firstChild;
    if (next !== row) body.insertBefore(row, next);
    at = row;
  }
  for (const row of before.values()) row.remove();
}

function fill(row, cells) {
  while (row.children.length > cells.length) row.lastChild.remove();
  cells.forEach((wanted, at) => {
    let target = row.children[at];
    if (!target) target = row.appendChild(wanted.head == null ? element("td") : element("th", { scope: "row" }));
    if (wanted.span) target.colSpan = wanted.span;
    target.title = wanted.title ?? "";
    target.className = [wanted.number && "n", wanted.bad && "bad", wanted.mono && "mono", wanted.wide && "wide"].filter(Boolean).join(" ");
    const text = String(wanted.head ?? wanted.text ?? "");
    if (wanted.action) button(target, text, wanted.action);
    else if ("gauge" in wanted) gauge(target, text, wanted.gauge);
    else if (wanted.swatch) swatch(target, text, wanted.swatch);
    else cell(target, text);
  });
}

function button(target, text, action) {
  const made = target.querySelector("button") || target.appendChild(element("button", { type: "button" }));
  cell(made, text);
  made.onclick = action;
}

function gauge(target, text, share) {
  if (!target.children.length) target.append(element("span", { className: "gauge" }, element("span")), element("span"));
  target.firstChild.hidden = share == null;
  target.firstChild.firstChild.style.width = `${100 * Math.min(1, share || 0)}%`;
  cell(target.lastChild, text);
}

function swatch(target, text, kind) {
  if (!target.children.length) target.append(element("span", { className: `swatch ${kind}` }), element("span"));
  cell(target.lastChild, text);
}

// A table in a place of its own that scrolls: `columns` [name, isNumber], `lines` a list of cells each.
export function table(title, columns, lines) {
  const head = element("tr", {}, ...columns.map(([text, isNumber]) => element("th", { scope: "col", className: isNumber ? "n" : "", textContent: text })));
  const body = element("tbody");
  rows(body, lines.map((cells, at) => ({ cells, at })), ({ at }) => String(at), ({ cells }) => cells, (row, { cells }) => row.classList.toggle("chosen", Boolean(cells[0].chosen)));
  const made = element("table", {}, element("thead", {}, head), body);
  made.setAttribute("aria-label", title);
  const region = element("div", { className: "scroll", tabIndex: 0 }, made);
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", title);
  return region;
}

export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value != null && value !== "");
  return element("dl", { className: "facts" }, ...shown.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}
