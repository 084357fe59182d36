
// --- the page of a run -------------------------------------------------------------------------
// Stands after viewer.js, in the same script. All objects of a page share one camera.

const camera = new Camera(), viewers = [];
let turning = false, last = 0;

function tick(now) {
  if (!turning) return;
  if (viewers.some((viewer) => viewer.slow)) return halt(); // by hand it is bearable
  if (last && viewers.some((viewer) => viewer.visible)) {
    camera.turn(Math.min(now - last, 100) * 0.0003, 0);
  }
  last = now;
  requestAnimationFrame(tick);
}

const buttons = (name) => document.querySelectorAll(`button[data-do="${name}"]`);

function label() {
  buttons("turn").forEach((button) => { button.textContent = turning ? "Stop" : "Turn"; });
  const other = camera.shape ? "Colours" : "Shape";
  buttons("shape").forEach((button) => { button.textContent = other; });
}

function halt() {
  turning = false;
  label();
}

const actions = {
  turn() {
    turning = !turning;
    last = 0;
    if (turning) requestAnimationFrame(tick);
    label();
  },
  shape() {
    camera.shape = 1 - camera.shape;
    camera.changed();
    label();
  },
  ground() {
    const grounds = ["white", "grey", "black"];
    document.querySelectorAll(".stage").forEach((stage) => {
      const now = grounds.findIndex((name) => stage.classList.contains(name));
      stage.classList.remove(...grounds);
      stage.classList.add(grounds[(now + 1) % 3]);
    });
  },
  reset() {
    camera.reset();
  },
};

for (const stage of document.querySelectorAll(".stage[data-object]")) {
  const data = document.getElementById(stage.dataset.object);
  try {
    const viewer = new Viewer(stage.querySelector("canvas"), camera);
    await viewer.show(JSON.parse(data.dataset.about), data.textContent);
    viewers.push(viewer);
    stage.classList.add("drawn");
  } catch (error) {
    stage.querySelector(".said").textContent = `The object cannot be drawn here: ${error.message}`;
  }
}
if (viewers.length) {
  camera.touched = halt;
  document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
  for (const [name, action] of Object.entries(actions)) {
    buttons(name).forEach((button) => button.addEventListener("click", action));
  }
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) actions.turn();
  label();
}
