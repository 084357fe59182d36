// The page of the studio: a form, the queue, the gallery, one run, and two side by side.
import { $, ask, h, keep, send, time } from "./dom.js";
import { drawCompare, drawRun, leaveView } from "./views.js";
import { called, fileUrl, runUrl, say } from "./runs.js";

const AT_WORK = ["queued", "running", "stopping"];
let offered, runs = [], queue = [], chosen = [];

// --- the form ------------------------------------------------------------------------------------

const form = { on: "gaussians", quality: "good", mesh: null };

function segments(box, options, key, after) {
  for (const option of options) {
    const input = h("input", { type: "radio", name: key, value: option.name, onchange: () => { form[key] = option.name; after?.(); } });
    box.append(h("label", { title: option.says }, input, h("span", {}, h("b", {}, option.title), h("small", {}, option.says), h("small", { class: "takes" }))));
  }
}

function pick(key, name) {
  form[key] = name;
  for (const input of document.querySelectorAll(`input[name=${key}]`)) input.checked = input.value === name;
}

function model() {
  return offered.models.find((each) => each.name === $("model").value);
}

function offer() {
  segments($("qualities"), offered.qualities, "quality");
  segments($("representations"), offered.representations, "on", suit);
  $("method").append(...offered.methods.map((m) => h("option", { value: m.name }, m.title)));
  $("model").append(...offered.models.map((m) => h("option", { value: m.name }, m.name + (m.here ? "" : " (not here)"))));
  $("prompt").maxLength = offered.max_prompt;
  $("mesh").accept = offered.mesh_endings.join(",");
  $("mesh").addEventListener("change", take);
  $("method").addEventListener("change", suit);
  $("model").addEventListener("change", suit);
  $("prompt").addEventListener("input", advise);
  $("form").addEventListener("input", () => complain("")); // it was about what has now changed
  $("any-words").addEventListener("change", advise);
  $("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); });
  fill(offered.defaults);
}

// Who is quicker than the studio has said what it offers is heard, too.
$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter") { e.preventDefault(); $("form").requestSubmit(); }
});
$("form").addEventListener("submit", (e) => { e.preventDefault(); make(); });
let isOffered;
const ready = new Promise((done) => { isOffered = done; });

// Put the choices of a run, or of none, into the form.
export function fill(values) {
  const known = (list, name, other) => (list.some((each) => each.name === name) ? name : other);
  const usual = offered.defaults;
  $("prompt").value = values.prompt ?? $("prompt").value;
  $("method").value = known(offered.methods, values.method, usual.method);
  $("model").value = known(offered.models, values.model, usual.model);
  $("seed").value = values.seed ?? 0;
  pick("on", known(offered.representations, values.on, usual.on));
  if (values.mesh) [form.mesh, $("mesh").value, $("mesh-says").textContent] = [values.mesh, "", values.mesh_title];
  pick("quality", known(offered.qualities, values.quality, usual.quality));
  suit();
}

// What a choice means for the others.
function suit() {
  const now = model();
  $("mesh-box").hidden = form.on !== offered.of_file;
  $("method-says").textContent = offered.methods.find((m) => m.name === $("method").value).says;
  $("model-says").textContent = now.says;
  const can = now.qualities[form.on];
  for (const input of document.querySelectorAll("input[name=quality]")) {
    input.disabled = !can.includes(input.value);
    input.parentElement.hidden = input.disabled;
  }
  if (!can.includes(form.quality)) pick("quality", can.includes("good") ? "good" : can[0]);
  expect();
  hint(now);
  advise();
}

// Send the mesh that was chosen; the form names it by what the studio calls it.
let taking = 0;
async function take() {
  const [file] = $("mesh").files, mine = ++taking, says = $("mesh-says");
  form.mesh = null;
  says.className = "";
  says.textContent = "";
  if (!file) return;
  try {
    if (file.size > offered.max_mesh) throw new Error(`a mesh has at most ${offered.max_mesh >> 20} MB`);
    says.textContent = "is being read …";
    const answer = await send(`api/meshes?name=${encodeURIComponent(file.name)}`, file);
    if (mine !== taking) return; // another one was chosen meanwhile
    [form.mesh, says.textContent] = [answer.mesh, answer.title];
  } catch (error) {
    if (mine !== taking) return;
    says.className = "warn";
    says.textContent = sentence(error.message);
  }
}

// How many steps each quality takes, and how long: as runs here took.
function expect() {
  const now = model(), steps = now.steps[form.on] || {};
  for (const input of document.querySelectorAll("input[name=quality]")) {
    const count = steps[input.value], box = input.parentElement.querySelector(".takes");
    const seconds = count && lasts({ model: now.name, on: form.on, method: $("method").value, quality: input.value, count }, steps);
    box.textContent = [count ? `${count} steps` : "", seconds ? `about ${roughly(seconds)}` : ""].filter(Boolean).join(", ");
  }
}

// Of the finished runs with this model and representation, those most like it: the median of their
// seconds; where they took another number of steps, as long as that many take. Null without any.
function lasts(wanted, steps) {
  const done = runs.filter((run) => run.state === "done" && run.kind === "studio" && run.seconds && run.attempt === 1
    && run.model === wanted.model && run.on === wanted.on && steps[run.quality]);
  const like = (...keys) => done.filter((run) => keys.every((key) => run[key] === wanted[key]));
  const nearest = [like("quality", "method"), like("quality"), like("method"), done].find((some) => some.length);
  if (!nearest) return null;
  const times = nearest.map((run) => run.seconds + (run.trained || run.seconds) * (wanted.count / steps[run.quality] - 1)).sort((a, b) => a - b);
  return times[Math.floor((times.length - 1) / 2)];
}

function roughly(seconds) {
  if (seconds < 90) return `${Math.max(10, 10 * Math.round(seconds / 10))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

let hinted;
function hint(now) {
  if (hinted === now.name) return;
  hinted = now.name;
  const words = now.words || {};
  const box = $("hints");
  box.replaceChildren();
  for (const group of ["objects", "colors"]) {
    if (!words[group]?.length) continue;
    const chips = words[group].map((word) => h("button", { type: "button", class: `chip ${group}`, onclick: () => use(group, word, words) },
      group === "colors" ? h("i", { class: `dot ${/^[a-z]+$/.test(word) ? word : ""}` }) : null, word));
    box.append(h("div", { class: "chips", role: "group", "aria-label": group }, chips));
  }
  if (now.words) box.prepend(h("p", { class: "advice row" }, `The model ${now.name} knows ${words.objects.length} objects:`, all(box)));
}

// The button that shows all objects, where there are more than a few lines of them.
function all(box) {
  const chips = box.querySelector(".chips"); // the objects come first
  const button = h("button", { type: "button", class: "link", "aria-expanded": "false" });
  const show = (open) => {
    chips.classList.toggle("open", open);
    button.textContent = open ? "show fewer" : "show all";
    button.setAttribute("aria-expanded", String(open));
  };
  button.addEventListener("click", () => show(!chips.classList.contains("open")));
  show(false);
  const measure = () => { button.hidden = !chips.classList.contains("open") && chips.scrollHeight <= chips.clientHeight + 1; };
  new ResizeObserver(measure).observe(chips);
  return button;
}

// Put a word of the model into the prompt: an object in the place of an object, a colour before it.
function use(group, word, words) {
  const text = $("prompt").value.trim().toLowerCase();
  const find = (list) => [...(list || [])].sort((a, b) => b.length - a.length).find((w) => new RegExp(`\\b${escape(w)}\\b`).test(text));
  const object = group === "objects" ? word : find(words.objects);
  const before = find(words.colors);
  const color = group === "colors" ? (before === word ? "" : word) : before;
  const name = [color, object].filter(Boolean).join(" ");
  const several = /^\w+[^s]s$/.test(object || ""); // sneakers
  $("prompt").value = several || !name ? name : `${/^[aeiou]/.test(name) ? "an" : "a"} ${name}`;
  complain("");
  advise();
  $("prompt").focus();
}

function escape(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

// What the model will make of the prompt, before it is sent; the server looks again.
function advise() {
  const now = model(), text = $("prompt").value, box = $("advice");
  box.className = "advice";
  box.textContent = "";
  if (!now.known || !text.trim()) return;
  const words = text.toLowerCase().replace(/['\u2019](s|t|re|ve|m|ll|d)\b/g, " ").match(/[\p{L}\p{N}\p{M}]+/gu) || [];
  const unknown = [...new Set(words)].filter((w) => !now.known.includes(w));
  const parts = new Set(now.words.objects.flatMap((name) => name.split(" ")));
  const said = [];
  if (!words.some((w) => parts.has(w))) {
    said.push($("any-words").checked ? "No object of this model is in it." : "Name one of the objects below: the model knows no other.");
  } else {
    if (unknown.length) said.push(`The model does not know ${quoted(unknown.slice(0, 4))}; it will do without.`);
    said.push(...uncolored(now.words, words));
  }
  box.textContent = said.join(" ");
  box.classList.toggle("warn", said.length > 0);
}

const quoted = (words) => words.map((w) => `“${w}”`).join(", ");

// A color for an object that the model has seen in its own colours only.
function uncolored(known, words) {
  const painted = known["colored objects"], spaced = ` ${words.join(" ")} `;
  const objects = known.objects.filter((name) => spaced.includes(` ${name} `));
  if (!painted || !objects.length || objects.some((name) => painted.includes(name))) return [];
  const colors = (known.colors || []).filter((c) => words.includes(c) && !objects.includes(c));
  if (!colors.length) return [];
  return [`The model has seen “${objects[0]}” in its own colours only: ${quoted(colors)} may change little.`];
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

let told;
export function tell(text) {
  clearTimeout(told);
  $("toast").textContent = text;
  $("toast").hidden = false;
  told = setTimeout(() => { $("toast").hidden = true; }, 8000);
}

async function make() {
  complain("");
  $("make").disabled = true;
  await ready;
  $("make").disabled = false;
  const seed = Number($("seed").value);
  const wanted = {
    prompt: $("prompt").value, on: form.on, quality: form.quality, method: $("method").value,
    model: $("model").value, seed, any_words: $("any-words").checked,
  };
  if (form.on === offered.of_file) {
    if (!form.mesh) return complain("Choose the file of the mesh that is to be painted.");
    wanted.mesh = form.mesh;
  }
  if (!Number.isSafeInteger(seed) || $("seed").value.trim() === "") return complain("The seed is a whole number.");
  $("make").disabled = true;
  try {
    await ask("api/runs", wanted);
    tell(`“${wanted.prompt.trim()}” is in the queue.`);
    await look();
    $("queue-box").scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch (error) {
    complain(sentence(error.message));
    if (/More choices/.test(error.message)) $("more").open = true;
    $("error").scrollIntoView({ block: "nearest" });
  } finally {
    $("make").disabled = false;
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// --- the queue -----------------------------------------------------------------------------------

export async function command(run, verb, body = {}) {
  try {
    const answer = await ask(`${runUrl(run)}/${verb}`, body);
    await look();
    return answer;
  } catch (error) {
    tell(sentence(error.message));
  }
}

export function bar(run) {
  const p = run.progress;
  if (run.state === "queued") {
    const place = queue.indexOf(run.name);
    return h("p", { class: "state" }, place <= 0 ? "waiting, next" : `waiting, ${place} before it`);
  }
  if (run.state === "stopping") return h("p", { class: "state" }, "stopping: saving what there is");
  if (p.paused) {
    return [
      h("progress", { max: p.of || 1, value: p.step }),
      h("p", { class: "state" }, h("b", {}, "paused"), h("a", { href: `#/run/${encodeURIComponent(run.name)}` }, "Resume is in its live view")),
    ];
  }
  const done = p.of ? ` ${p.step} of ${p.of}` : " …";
  const words = { starting: "loading the model", training: "training", rendering: "drawing the views", exporting: "writing the files" };
  return [
    h("progress", p.of ? { max: p.of, value: p.step } : {}),
    h("p", { class: "state" }, `${words[p.stage]}${done}`,
      h("span", {}, p.left === null ? `for ${time(p.elapsed)}` : `about ${time(p.left)} left`)),
  ];
}

function strip(run) {
  const picture = run.files.preview && h("img", { src: fileUrl(run, "preview"), alt: `preview of ${run.prompt}` });
  return h("span", { class: picture ? "strip" : "strip blank", "data-time": String(run.files.preview) }, picture);
}

// What is there already is changed, and not made anew: it may be under the mouse.
function drawWork(run, old) {
  if (old?.dataset.state === run.state) {
    old.querySelector(".prompt").textContent = called(run);
    old.querySelector(".now").replaceChildren(...[bar(run)].flat());
    const before = old.querySelector(".strip");
    if (before.dataset.time !== String(run.files.preview)) before.replaceWith(strip(run));
    return old;
  }
  const link = `#/run/${encodeURIComponent(run.name)}`;
  return h("article", { class: "work", "data-state": run.state },
    h("a", { href: link, class: "picture", tabIndex: -1, "aria-hidden": "true" }, strip(run)),
    h("div", {},
      h("a", { href: link, class: "prompt" }, called(run)),
      h("div", { class: "now" }, bar(run)),
      run.can.includes("cancel") && h("button", { class: "quiet", onclick: () => command(run, "cancel") }, run.state === "queued" ? "remove from the queue" : "cancel")));
}

// --- the gallery ---------------------------------------------------------------------------------

// Films play under the mouse: to draw them all takes a processor that may be training meanwhile.
// Where there is no mouse they play while they are seen, unless the user wants less motion.
const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const touch = window.matchMedia("(hover: none)").matches;
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !calm) target.play().catch(() => {}); else target.pause();
  }
});

function drawCard(run) {
  const link = `#/run/${encodeURIComponent(run.name)}`;
  let shown;
  if (run.files.video) {
    shown = h("video", { src: `${fileUrl(run, "video")}#t=0.01`, muted: true, loop: true, playsInline: true, preload: "metadata" });
    if (touch) seen.observe(shown);
  } else if (run.files.picture) shown = h("img", { src: fileUrl(run, "picture"), alt: "" });
  else shown = h("span", { class: "blank" });
  const tick = h("input", { type: "checkbox", checked: chosen.includes(run.name), "aria-label": `compare ${run.prompt}`, onchange: (e) => choose(run.name, e.target.checked) });
  const play = () => shown.play?.().catch(() => {});
  const pause = () => shown.pause?.();
  const watch = touch ? {} : { onpointerenter: play, onpointerleave: pause, onfocusin: play, onfocusout: pause };
  return h("article", { class: "card", ...watch },
    h("label", { class: "choose" }, tick, h("span", {}, "compare")),
    h("a", { href: link, onclick: (e) => { // while two are chosen, the picture is part of its tick
      if (!$("choose").checked || e.ctrlKey || e.metaKey || e.shiftKey) return;
      e.preventDefault();
      choose(run.name, !chosen.includes(run.name));
    } }, h("span", { class: "picture" }, shown), h("span", { class: "prompt" }, called(run))),
    h("p", { class: "about" }, say(run, offered)));
}

function choose(name, yes) {
  chosen = chosen.filter((each) => each !== name);
  if (yes) chosen = [...chosen, name].slice(-2);
  for (const card of $("gallery").children) card.querySelector("input").checked = chosen.includes(card.dataset.key);
  $("compare").disabled = chosen.length !== 2;
  $("compare").textContent = chosen.length === 1 ? "Choose one more" : "Compare";
}

function drawOther(run) {
  const why = { failed: run.error, stopped: "cancelled", interrupted: run.error, damaged: run.error, unfinished: "not finished" };
  const can = (verb) => run.can.includes(verb);
  return h("article", { class: `other ${run.state}` },
    h("div", {}, h("a", { href: `#/run/${encodeURIComponent(run.name)}`, class: "prompt" }, run.prompt || run.name),
      h("p", { class: "about" }, h("b", {}, run.state), " ", why[run.state] && why[run.state] !== run.state ? `— ${why[run.state]}` : "")),
    h("div", { class: "buttons" },
      can("resume") && h("button", { class: "quiet", onclick: () => command(run, "resume") }, run.state === "failed" ? "try again" : "go on"),
      can("remove") && h("button", { class: "quiet", onclick: () => remove(run) }, "remove")));
}

export async function remove(run) {
  if (!window.confirm(`Delete “${run.prompt || run.name}” and all its files for good?`)) return false;
  return command(run, "remove");
}

function drawGallery() {
  const work = runs.filter((run) => AT_WORK.includes(run.state));
  const place = (run) => (run.state === "queued" ? 1 + queue.indexOf(run.name) : 0);
  work.sort((a, b) => place(a) - place(b));
  const done = runs.filter((run) => run.state === "done");
  const others = runs.filter((run) => !AT_WORK.includes(run.state) && run.state !== "done");
  $("queue-box").hidden = !work.length;
  keep($("queue"), work, (run) => run.name, drawWork);
  keep($("gallery"), done, (run) => run.name, drawCard);
  keep($("others"), others, (run) => run.name, drawOther);
  $("others-box").hidden = !others.length;
  $("empty").hidden = done.length + work.length > 0;
  $("count").textContent = done.length ? `${done.length} ${done.length === 1 ? "object" : "objects"}` : "";
  $("compare-label").hidden = done.length < 2;
  choose("", false);
  document.title = work.length ? `(${work.length}) LODS studio` : "LODS studio";
}

$("choose").addEventListener("change", (e) => {
  $("gallery").classList.toggle("choosing", e.target.checked);
  $("compare").hidden = !e.target.checked;
  if (!e.target.checked) { chosen = []; choose("", false); }
});
$("compare").addEventListener("click", () => {
  location.hash = `#/compare/${chosen.map(encodeURIComponent).join("/")}`;
});

// --- where the page is ---------------------------------------------------------------------------

function route() {
  const [, view, ...names] = location.hash.split("/");
  let decoded;
  try { decoded = names.map(decodeURIComponent); } catch { decoded = []; }
  const found = decoded.map((name) => runs.find((run) => run.name === name)).filter(Boolean);
  const where = { run: found.length === 1 && "run", compare: found.length === 2 && "compare" }[view] || "gallery";
  for (const each of ["gallery", "run", "compare"]) $(`${each}-view`).hidden = each !== where;
  document.body.dataset.view = where;
  if (where === "gallery") leaveView();
  else if (where === "run") drawRun($("run-view"), found[0], offered);
  else drawCompare($("compare-view"), found, runs.filter((run) => run.state === "done"), offered);
}

window.addEventListener("hashchange", () => { route(); window.scrollTo(0, 0); });

let timer;
export async function look() {
  clearTimeout(timer);
  try {
    ({ runs, queue } = await ask("api/runs"));
    $("offline").hidden = true;
    expect();
    drawGallery();
    route();
  } catch (error) {
    if (error instanceof TypeError) $("offline").hidden = false; // no answer at all
    else throw error;
  } finally {
    const soon = runs.some((run) => AT_WORK.includes(run.state));
    timer = setTimeout(look, document.hidden ? 10000 : soon ? 1500 : 4000);
  }
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && offered) look(); });

async function begin() {
  if (location.search) history.replaceState(null, "", location.pathname + location.hash); // the token
  try {
    offered = await ask("api/choices");
  } catch {
    $("offline").hidden = false;
    return void setTimeout(begin, 3000);
  }
  offer();
  isOffered();
  await look();
}

begin();
