// One run, large; and two side by side, seen by one camera.
import { ask, h, time } from "./dom.js";
import { bar, command, fill, remove } from "./studio.js";
import { called, downloadUrl, drawnUrl, fileUrl, runUrl, say, title } from "./runs.js";
import { Camera, Viewer } from "./viewer.js";

const FORMATS = {
  ply: ["ply", "3D Gaussians, for SuperSplat and other viewers of splats"],
  splat: ["splat", "the small format of viewers in browsers"],
  glb: ["glb", "a mesh with colours, for Blender and nearly everything else"],
  video: ["mp4", "the turntable as a film"],
};
const MESH_PLY = ["ply", "the mesh with colours, as ply"];
const WAYS = { ply: "Splats", glb: "Mesh", video: "Turntable", picture: "Views", preview: "Preview" };
const GROUNDS = ["white", "grey", "black"]; // classes of a stage, after its own
let open = null; // what is on show: { key, close, update }

export function leaveView() {
  open?.close();
  open = null;
}

// What can be looked at of a run, the best first. Of a radiance field, ply is a mesh: not splats.
function ways(run) {
  const order = run.on === "gaussians" ? ["ply", "glb", "video", "picture"] : ["glb", "video", "picture"];
  const found = order.filter((way) => way in run.files);
  return found.length ? found : "preview" in run.files ? ["preview"] : [];
}

// --- a pane that shows an object -------------------------------------------------------------------

class Pane {
  constructor(camera, turntable) {
    this.camera = camera;
    this.turntable = turntable;
    this.stage = h("div", { class: "stage" });
    this.tabs = h("div", { class: "tabs", role: "group", "aria-label": "how it is shown" });
    this.element = h("div", { class: "pane" }, this.stage, this.tabs);
  }

  async show(run, way) {
    const can = ways(run);
    way = can.includes(way) ? way : can[0];
    const key = `${run.name} ${way} ${way && run.files[way]}`;
    if (key === this.key) return;
    this.close();
    [this.key, this.run, this.way] = [key, run, way];
    this.tabs.replaceChildren(...(can.length > 1 ? can : []).map((each) =>
      h("button", { class: each === way ? "on" : "", "aria-pressed": String(each === way), onclick: () => this.show(this.run, each) }, WAYS[each])));
    if (way === "ply" || way === "glb") await this.turnable(run, way, key);
    else if (way === "video") this.film(run);
    else if (way) this.stage.replaceChildren(h("img", { src: fileUrl(run, way), class: way, alt: run.prompt }));
    else this.stage.replaceChildren(h("p", { class: "note" }, "There is no picture yet."));
  }

  async turnable(run, way, key) {
    const canvas = h("canvas", { tabIndex: 0, "aria-label": `${run.prompt}, to be turned with the mouse or the arrow keys` });
    const note = h("p", { class: "note" }, "loading …");
    this.stage.replaceChildren(canvas, note);
    try {
      const { about, data, left_out } = await ask(drawnUrl(run, way));
      if (this.key !== key) return;
      this.viewer = new Viewer(canvas, this.camera, { scroll: true });
      await this.viewer.show(about, data);
      if (this.key !== key) return;
      note.textContent = ["Drag to turn, scroll to zoom, double-click to reset.", ...left_out].join(" ");
      setTimeout(() => note.classList.add("gone"), 4000);
      this.stage.append(this.tools(way));
    } catch (error) {
      if (this.key !== key) return;
      if (run.files.video) return this.film(run);
      note.textContent = error.message;
    }
  }

  // Buttons on an object: what is behind it, and whether a mesh has its colours.
  tools(way) {
    const button = (text, says, press) =>
      h("button", { class: "quiet", type: "button", title: says, onclick: press }, text);
    const ground = () => {
      const now = GROUNDS.findIndex((name) => this.stage.classList.contains(name));
      this.stage.classList.remove(...GROUNDS);
      if (now + 1 < GROUNDS.length) this.stage.classList.add(GROUNDS[now + 1]);
    };
    const shape = () => {
      this.camera.shape = 1 - this.camera.shape;
      this.camera.changed();
    };
    return h("div", { class: "on-stage" },
      button("Background", "white, grey, black", ground),
      way === "glb" && button("Shape", "with and without its colours", shape));
  }

  film(run) {
    this.video = h("video", { src: fileUrl(run, "video"), muted: true, loop: true, playsInline: true, controls: !this.turntable, autoplay: !this.turntable });
    this.stage.replaceChildren(this.video);
    if (this.turntable) this.video.addEventListener("loadedmetadata", () => this.seek(this.turntable()));
  }

  seek(part) {
    if (this.video?.duration) this.video.currentTime = part * 0.999 * this.video.duration;
  }

  close() {
    this.viewer?.close();
    this.viewer = this.video = this.key = null;
  }
}

// --- one run -------------------------------------------------------------------------------------

export function drawRun(box, run, offered) {
  if (open?.key !== `run ${run.name}`) {
    leaveView();
    open = oneRun(box, run, offered);
    open.key = `run ${run.name}`;
  }
  open.update(run);
}

function oneRun(box, first, offered) {
  const pane = new Pane(new Camera()), side = h("div", { class: "facts" });
  const live = h("div", { class: "live" }), name = h("h1", {}), now = h("div", { class: "now" });
  const main = h("div", { class: "run" }, h("div", {}, pane.element, live));
  const log = h("pre", { tabIndex: 0 }), more = h("details", { ontoggle: () => refresh(true) }, h("summary", {}, "What it has printed"), log);
  let run = first, about = null, drawn = "", closed = false;
  box.replaceChildren(
    h("div", { class: "bar" }, h("a", { href: "#/", class: "back" }, "← Gallery"), name), main);
  main.append(h("div", {}, side, more));

  async function refresh(always) {
    try { about = await ask(runUrl(run)); } catch { return; }
    if (closed) return;
    log.textContent = about.log || "nothing yet";
    const text = JSON.stringify([about.formats, about.state, about.error, about.can, about.files.report]);
    if (text === drawn && !always) return;
    drawn = text;
    side.replaceChildren(...facts(run, about, offered, now, () => refresh(true)));
  }

  return {
    update(latest) {
      run = latest;
      name.textContent = called(run);
      now.replaceChildren(...(["queued", "running", "stopping"].includes(run.state) ? [bar(run)].flat() : []));
      main.classList.toggle("watched", run.live);
      if (run.live && !live.firstChild) {
        const address = `live/${encodeURIComponent(run.name)}/`;
        live.replaceChildren(h("iframe", { src: address, title: "live view" }), h("a", { href: address, target: "_blank", rel: "noopener" }, "open the live view alone"));
      } else if (!run.live && live.firstChild) live.replaceChildren();
      pane.element.hidden = run.live;
      if (!run.live) pane.show(run, pane.way === "preview" ? undefined : pane.way);
      refresh(false);
    },
    close() { closed = true; pane.close(); live.replaceChildren(); },
  };
}

function facts(run, about, offered, now, refresh) {
  const rows = [
    ["Made of", title(offered.representations, run.on)], ["Mesh", run.mesh_title], ["Method", title(offered.methods, run.method)], ["Model", run.model],
    ["Quality", title(offered.qualities, run.quality)], ["Seed", String(run.seed ?? "")],
    ["Time", run.state === "done" && run.seconds ? time(run.seconds) : ""], ["Folder", about.folder],
  ].filter(([, value]) => value);
  const can = (verb) => about.can.includes(verb);
  return [
    h("p", { class: `badge ${about.state}` }, about.state),
    now,
    about.error ? h("p", { class: "error" }, about.error) : null,
    downloads(run, about, refresh),
    can("again") && again(run, offered),
    h("dl", {}, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("div", { class: "buttons" },
      can("cancel") && h("button", { class: "quiet", onclick: () => command(run, "cancel") }, "Cancel"),
      can("resume") && h("button", { onclick: () => command(run, "resume") }, run.state === "failed" ? "Try again" : "Go on with it"),
      can("finish") && about.formats.video === "possible" && h("button", { class: "quiet", onclick: () => command(run, "export", { format: "video" }).then(refresh) }, "Draw it as it is"),
      can("remove") && h("button", { class: "quiet danger", onclick: async () => { if (await remove(run)) location.hash = "#/"; } }, "Delete")),
  ].filter(Boolean);
}

function downloads(run, about, refresh) {
  const items = Object.entries(about.formats).map(([format, state]) => {
    const [ending, says] = format === "ply" && run.on !== "gaussians" ? MESH_PLY : FORMATS[format];
    const text = [h("b", {}, ending), h("small", {}, says)];
    if (state === "ready") return h("a", { class: "download", href: downloadUrl(run, format), download: "" }, text);
    if (state === "making") {
      setTimeout(refresh, 1000);
      return h("span", { class: "download busy" }, h("b", {}, `${ending} …`), h("small", {}, "is being made"));
    }
    const failed = state.startsWith("failed");
    return h("button", { class: "download ask", onclick: () => command(run, "export", { format }).then(refresh) },
      h("b", {}, `make ${ending}`), h("small", { class: failed ? "warn" : "" }, failed ? state : says));
  });
  if ("report" in about.files) {
    const text = [h("b", {}, "html"), h("small", {}, "the page of the run: the object, views, curves and settings in one file")];
    items.push(h("a", { class: "download", href: downloadUrl(run, "report"), download: "" }, text));
  }
  return items.length ? h("section", {}, h("h2", {}, "Download"), h("div", { class: "downloads" }, items)) : null;
}

function again(run, offered) {
  const start = (values, now) => {
    fill({ ...run, ...values });
    document.getElementById("form").scrollIntoView({ behavior: "smooth", block: "start" });
    if (now) document.getElementById("form").requestSubmit();
  };
  const method = h("select", { "aria-label": "another method" }, h("option", { value: "" }, "another method …"),
    offered.methods.filter((m) => m.name !== run.method).map((m) => h("option", { value: m.name }, m.title)));
  method.addEventListener("change", () => method.value && (start({ method: method.value }, true), (method.value = "")));
  return h("section", {}, h("h2", {}, "Make it again with"),
    h("div", { class: "buttons" },
      h("button", { class: "quiet", onclick: () => start({ seed: Math.floor(Math.random() * 1e6) }, true) }, "another seed"),
      method,
      h("button", { class: "quiet", onclick: () => start({}, false) }, "other choices")));
}

// --- two runs ------------------------------------------------------------------------------------

export function drawCompare(box, pair, done, offered) {
  const key = `compare ${pair.map((run) => run.name).join(" / ")}`;
  if (open?.key !== key) {
    leaveView();
    open = twoRuns(box, pair, done, offered);
    open.key = key;
  }
}

function twoRuns(box, pair, done, offered) {
  const camera = new Camera();
  const slider = h("input", { type: "range", min: 0, max: 1000, value: 0, "aria-label": "turn both", oninput: () => turn() });
  const part = () => slider.value / 1000;
  const panes = pair.map(() => new Pane(camera, part));
  const turn = () => {
    for (const pane of panes) pane.seek(part());
    camera.azimuth = 2 * Math.PI * part() + 0.5;
    camera.changed();
  };
  // the best way that both have
  const shared = ways(pair[0]).find((way) => ways(pair[1]).includes(way));
  const columns = panes.map((pane, k) => {
    const select = h("select", { "aria-label": k ? "right" : "left" }, done.map((run) =>
      h("option", { value: run.name, selected: run.name === pair[k].name }, `${called(run)} · ${say(run, offered)}`)));
    select.addEventListener("change", () => {
      const names = pair.map((run, j) => encodeURIComponent(j === k ? select.value : run.name));
      location.hash = `#/compare/${names.join("/")}`;
    });
    pane.show(pair[k], shared);
    return h("div", {}, select, pane.element, h("p", { class: "about" }, [say(pair[k], offered), pair[k].seconds ? time(pair[k].seconds) : ""].filter(Boolean).join(" · ")));
  });
  box.replaceChildren(
    h("div", { class: "bar" }, h("a", { href: "#/", class: "back" }, "← Gallery"), h("h1", {}, "Side by side")),
    h("div", { class: "two" }, columns),
    h("label", { class: "turn" }, "turn both", slider));
  return { update() {}, close() { panes.forEach((pane) => pane.close()); } };
}
