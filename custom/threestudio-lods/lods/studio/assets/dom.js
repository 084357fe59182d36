// Elements from data. Texts become text nodes: nothing that a run or a user has written is markup.
export const $ = (id) => document.getElementById(id);

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else if (key in element && key !== "list") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

// Make the children of `box` those of `items`, and keep those that have not changed: a film plays on.
export function keep(box, items, key, draw) {
  const before = new Map([...box.children].map((child) => [child.dataset.key, child]));
  const now = items.map((item) => {
    const text = JSON.stringify(item);
    const old = before.get(key(item));
    if (old && old.dataset.item === text) return old;
    const element = draw(item, old);
    element.dataset.key = key(item);
    element.dataset.item = text;
    return element;
  });
  const same = now.length === box.children.length && now.every((e, k) => e === box.children[k]);
  if (!same) box.replaceChildren(...now);
}

export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  return content(await fetch(path, options));
}

// Send a file as it is.
export async function send(path, file) {
  return content(await fetch(path, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file }));
}

async function content(answer) {
  const type = answer.headers.get("Content-Type") || "";
  const found = type.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(found.error || `the studio answered ${answer.status}`);
  return found;
}

export function time(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}
