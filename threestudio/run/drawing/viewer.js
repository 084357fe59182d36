// Draws an object of a run in a canvas, with WebGL 2: Gaussians as splats, a mesh with the colours
// of its corners; and turns it by mouse, fingers and keys. z is up, the front is on +x.
//
//     const camera = new Camera();
//     const viewer = new Viewer(canvas, camera);
//     await viewer.show(about, data); // what packed() in objects.py gives; throws without WebGL 2
//
// Viewers of one camera turn together. A canvas has data-state="moving" while it is drawn small,
// where that is slow, and "resting" once it is drawn as well as it can be. Nothing is fetched.

const SPLAT_VERTEX = `#version 300 es
precision highp float;
uniform highp sampler2D table;
uniform mat4 view, projection;
uniform vec2 focal, viewport;
out vec2 place;
out vec4 color;
vec4 entry(int k) {
  int i = (gl_VertexID & ~3) + k; // four vertices a Gaussian, four texels a Gaussian
  return texelFetch(table, ivec2(i & 2047, i >> 11), 0);
}
void main() {
  vec4 a = entry(0), b = entry(1), c = entry(2), d = entry(3);
  vec4 seen = view * vec4(a.xyz, 1.0);
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0);
  if (seen.z > -0.02) return;
  // the covariance on the screen, in pixels (Zwicker et al., EWA splatting); far beside the picture
  // the approximation would explode
  float z = -seen.z;
  vec2 limit = 0.65 * viewport / focal, slope = clamp(seen.xy / z, -limit, limit);
  mat3 jacobian = mat3(focal.x / z, 0.0, 0.0, 0.0, focal.y / z, 0.0,
    focal.x * slope.x / z, focal.y * slope.y / z, 0.0);
  mat3 turn = jacobian * mat3(view);
  mat3 flat_ = turn * mat3(b.x, b.y, b.z, b.y, b.w, c.x, b.z, c.x, c.y) * transpose(turn);
  float p = flat_[0][0] + 0.3, q = flat_[0][1], r = flat_[1][1] + 0.3;
  float middle = 0.5 * (p + r), gap = length(vec2(0.5 * (p - r), q));
  vec2 axis = abs(q) > 1e-6 ? normalize(vec2(q, middle + gap - p))
    : (p >= r ? vec2(1.0, 0.0) : vec2(0.0, 1.0));
  vec2 longest = min(sqrt(2.0 * (middle + gap)), 1024.0) * axis;
  vec2 shortest = min(sqrt(2.0 * max(middle - gap, 0.1)), 1024.0) * vec2(axis.y, -axis.x);
  vec4 clip = projection * seen;
  vec2 at = clip.xy / clip.w;
  // a side of the square is where the opacity has fallen to 1/255
  if (a.w < 1.0 / 255.0) return;
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1 & 1) * 2.0 - 1.0;
  place = corner * sqrt(log(255.0 * a.w));
  gl_Position = vec4(at + 2.0 * (place.x * longest + place.y * shortest) / viewport, 0.0, 1.0);
  color = vec4(d.rgb, a.w);
}`;
const SPLAT_FRAGMENT = `#version 300 es
precision highp float;
in vec2 place;
in vec4 color;
out vec4 pixel;
void main() {
  float alpha = min(0.999, color.a * exp(-dot(place, place)));
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(color.rgb * alpha, alpha);
}`;
const MESH_VERTEX = `#version 300 es
precision highp float;
uniform mat4 view, projection;
in vec3 position;
in vec3 tint;
out vec3 color, seen;
void main() {
  vec4 at = view * vec4(position, 1.0);
  seen = at.xyz;
  color = tint;
  gl_Position = projection * at;
}`;
const MESH_FRAGMENT = `#version 300 es
precision highp float;
uniform float shape;
in vec3 color, seen;
out vec4 pixel;
void main() {
  vec3 normal = normalize(cross(dFdx(seen), dFdy(seen)));
  float light = 0.25 + 0.7 * abs(dot(normal, normalize(vec3(0.3, 0.5, 1.0))));
  pixel = vec4(mix(color, vec3(light), shape), 1.0);
}`;

// --- bytes -------------------------------------------------------------------------------------

async function unpack(base64) {
  const text = atob(base64.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function positions(buffer, at, about) {
  const raw = new Uint16Array(buffer, at, about.count * 3);
  const out = new Float32Array(raw.length);
  for (let i = 0; i < raw.length; i++) {
    const k = i % 3;
    out[i] = about.low[k] + (raw[i] / 65535) * (about.high[k] - about.low[k]);
  }
  return out;
}

function program(gl, vertex, fragment, names) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  names.forEach((name, i) => gl.bindAttribLocation(made, i, name));
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
  return { made, of: (name) => gl.getUniformLocation(made, name) };
}

function attribute(gl, index, data, size, kind, normalized) {
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
  gl.enableVertexAttribArray(index);
  gl.vertexAttribPointer(index, size, kind, normalized, 0, 0);
}

// --- Gaussians -------------------------------------------------------------------------------

function splats(gl, about, buffer) {
  const n = about.count;
  const at = positions(buffer, 0, about);
  const sizes = new Uint8Array(buffer, 6 * n, 3 * n);
  const turns = new Int8Array(buffer, 9 * n, 4 * n);
  const colors = new Uint8Array(buffer, 13 * n, 4 * n);
  const rows = Math.max(1, Math.ceil((4 * n) / 2048));
  const table = new Float32Array(rows * 2048 * 4);
  const [least, most] = about.sizes;
  for (let i = 0; i < n; i++) {
    const s = [0, 1, 2].map((k) => {
      return Math.exp(2 * (least + (sizes[3 * i + k] / 255) * (most - least)));
    });
    let [w, x, y, z] = turns.subarray(4 * i, 4 * i + 4);
    const norm = Math.hypot(w, x, y, z) || 1;
    w /= norm; x /= norm; y /= norm; z /= norm;
    const r = [
      1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
      2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
      2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ];
    const c = (a, b) => r[3 * a] * r[3 * b] * s[0] + r[3 * a + 1] * r[3 * b + 1] * s[1]
      + r[3 * a + 2] * r[3 * b + 2] * s[2];
    table.set([
      at[3 * i], at[3 * i + 1], at[3 * i + 2], colors[4 * i + 3] / 255,
      c(0, 0), c(0, 1), c(0, 2), c(1, 1), c(1, 2), c(2, 2), 0, 0,
      colors[4 * i] / 255, colors[4 * i + 1] / 255, colors[4 * i + 2] / 255, 0,
    ], 16 * i);
  }
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, 2048, rows, 0, gl.RGBA, gl.FLOAT, table);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  const { made, of } = program(gl, SPLAT_VERTEX, SPLAT_FRAGMENT, []);
  gl.useProgram(made);
  // two triangles each, in the order of drawing: instances are far slower in some browsers
  const order = new Uint32Array(6 * n), bucket = new Uint16Array(n);
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  let sorted = [2, 2, 2];

  // the furthest first, by counting: 65,536 classes of depth
  function sort(x, y, z) {
    if (x * sorted[0] + y * sorted[1] + z * sorted[2] > 0.99997 && sorted[0] < 2) return;
    sorted = [x, y, z];
    let least = Infinity, most = -Infinity;
    const depth = new Float32Array(n);
    for (let i = 0; i < n; i++) {
      const d = x * at[3 * i] + y * at[3 * i + 1] + z * at[3 * i + 2];
      depth[i] = d;
      if (d < least) least = d;
      if (d > most) most = d;
    }
    const scale = 65535 / Math.max(most - least, 1e-9);
    const starts = new Uint32Array(65537);
    for (let i = 0; i < n; i++) {
      bucket[i] = (depth[i] - least) * scale;
      starts[bucket[i] + 1]++;
    }
    for (let i = 0; i < 65536; i++) starts[i + 1] += starts[i];
    for (let i = 0; i < n; i++) {
      const k = 6 * starts[bucket[i]]++, first = 4 * i;
      order[k] = first;
      order[k + 1] = order[k + 3] = first + 1;
      order[k + 2] = order[k + 4] = first + 2;
      order[k + 5] = first + 3;
    }
    gl.bufferSubData(gl.ELEMENT_ARRAY_BUFFER, 0, order);
  }

  return ({ view, projection, focal, back }, width, height) => {
    sort(...back);
    gl.uniformMatrix4fv(of("view"), false, view);
    gl.uniformMatrix4fv(of("projection"), false, projection);
    gl.uniform2f(of("focal"), focal, focal);
    gl.uniform2f(of("viewport"), width, height);
    gl.drawElements(gl.TRIANGLES, 6 * n, gl.UNSIGNED_INT, 0);
  };
}

// --- meshes ----------------------------------------------------------------------------------

function mesh(gl, about, buffer) {
  const corners = new Uint32Array(buffer.slice(0, 12 * about.faces));
  for (let i = 1; i < corners.length; i++) corners[i] = (corners[i] + corners[i - 1]) >>> 0;
  const at = 12 * about.faces;
  const { made, of } = program(gl, MESH_VERTEX, MESH_FRAGMENT, ["position", "tint"]);
  gl.useProgram(made);
  attribute(gl, 0, positions(buffer, at, about), 3, gl.FLOAT, false);
  const colors = new Uint8Array(buffer, at + 6 * about.count, 3 * about.count);
  attribute(gl, 1, colors, 3, gl.UNSIGNED_BYTE, true);
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, corners, gl.STATIC_DRAW);
  gl.enable(gl.DEPTH_TEST);
  return ({ view, projection }, width, height, shape) => {
    gl.uniformMatrix4fv(of("view"), false, view);
    gl.uniformMatrix4fv(of("projection"), false, projection);
    gl.uniform1f(of("shape"), shape);
    gl.drawElements(gl.TRIANGLES, corners.length, gl.UNSIGNED_INT, 0);
  };
}

// --- the camera --------------------------------------------------------------------------------

// What viewers look through: turned by `azimuth` and `lift` (radians; the latter is added to the
// elevation of each object), nearer by `zoom`; `shape` 1 shows meshes without their colours.
export class Camera {
  constructor() {
    this.listeners = new Set();
    this.touched = () => {}; // somebody has taken hold of an object
    this.lowest = 0;
    this.highest = 0;
    this.shape = 0;
    this.reset();
  }
  reset() {
    Object.assign(this, { azimuth: 0.5, lift: 0, zoom: 1 });
    this.changed();
  }
  turn(right, up) {
    this.azimuth += right;
    this.lift = Math.min(this.highest, Math.max(this.lowest, this.lift + up));
    this.changed();
  }
  closer(factor) {
    this.zoom = Math.min(8, Math.max(0.25, this.zoom * factor));
    this.changed();
  }
  changed() {
    for (const listener of this.listeners) listener();
  }
}

const STEEPEST = 1.5;

function matricesOf(about, camera, width, height) {
  const elevation = Math.min(STEEPEST, Math.max(-STEEPEST, about.elevation + camera.lift));
  const [ca, sa] = [Math.cos(camera.azimuth), Math.sin(camera.azimuth)];
  const [ce, se] = [Math.cos(elevation), Math.sin(elevation)];
  const back = [ce * ca, ce * sa, se]; // from the middle to the eye
  const right = [-sa, ca, 0], up = [-se * ca, -se * sa, ce];
  const distance = about.distance / camera.zoom;
  const eye = back.map((value, k) => about.middle[k] + distance * value);
  const dot = (a) => -(a[0] * eye[0] + a[1] * eye[1] + a[2] * eye[2]);
  const view = new Float32Array([
    right[0], up[0], back[0], 0, right[1], up[1], back[1], 0, right[2], up[2], back[2], 0,
    dot(right), dot(up), dot(back), 1,
  ]);
  // the field of view is that of the shorter side
  const focal = Math.min(width, height) / 2 / Math.tan(about.fovy / 2);
  const near = distance / 100, far = distance * 10;
  const projection = new Float32Array([
    (2 * focal) / width, 0, 0, 0, 0, (2 * focal) / height, 0, 0,
    0, 0, (far + near) / (near - far), -1, 0, 0, (2 * far * near) / (near - far), 0,
  ]);
  return { view, projection, focal, back };
}

// --- the viewer --------------------------------------------------------------------------------

const MOVING = 30, AT_REST = 900; // milliseconds that a picture may take
const LEAST = 0.3; // share of the canvas's pixels that is drawn at least, along a side

const within = (share) => Math.min(1, Math.max(LEAST, share));

export class Viewer {
  // `scroll`: the wheel zooms always, and not only once the object has been clicked.
  constructor(canvas, camera, { scroll = false } = {}) {
    Object.assign(this, { canvas, camera, visible: true, closed: false, due: false, rest: false });
    this.wanted = false; // a picture, while one is being drawn
    // along a side: less while it moves, where that is slow (a phone, or a browser that draws with
    // the processor), and more once it rests
    Object.assign(this, { detail: LEAST, still: 1, drawn: 0, took: 0, pace: 0, stale: true });
    this.ask = () => this.later(false);
    camera.listeners.add(this.ask);
    this.watching = [new ResizeObserver(this.ask), new IntersectionObserver((seen) => {
      this.visible = seen[seen.length - 1].isIntersecting;
      this.ask();
    })];
    for (const each of this.watching) each.observe(canvas);
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      this.draw = null;
    });
    canvas.addEventListener("webglcontextrestored", () => {
      if (this.closed) return;
      this.begin();
      this.ask();
    });
    steer(canvas, camera, scroll);
  }

  async show(about, data) {
    [this.about, this.buffer] = [about, await unpack(data)];
    if (this.closed) return;
    const options = { antialias: about.kind === "mesh", alpha: true, premultipliedAlpha: true };
    this.gl = this.canvas.getContext("webgl2", options);
    if (!this.gl) throw new Error("this browser has no WebGL 2");
    this.begin();
    this.due = true; // nothing else is drawn while that is timed
    await this.paint(LEAST); // the first one prepares the program
    await this.paint(LEAST);
    this.due = false;
    if (this.closed) return;
    this.pace = this.took;
    this.detail = within(LEAST * Math.sqrt(MOVING / this.took));
    this.still = within(LEAST * Math.sqrt(AT_REST / this.took));
    const { camera } = this;
    camera.lowest = Math.min(camera.lowest, -STEEPEST - about.elevation);
    camera.highest = Math.max(camera.highest, STEEPEST - about.elevation);
    this.ask();
  }

  // Whether even a small picture takes long.
  get slow() {
    return this.pace > 100;
  }

  close() {
    this.closed = true;
    clearTimeout(this.settling);
    this.camera.listeners.delete(this.ask);
    for (const each of this.watching) each.disconnect();
    this.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  }

  begin() {
    const draws = { splats, mesh }[this.about.kind];
    this.draw = draws(this.gl, this.about, this.buffer);
  }

  later(rest) {
    if (this.closed || !this.draw) return;
    this.rest = rest;
    clearTimeout(this.settling);
    if (!rest) {
      this.stale = true; // a slow browser may come to rest before it has drawn this
      this.canvas.dataset.state = "moving";
      this.settling = setTimeout(() => this.later(true), 200);
    }
    this.wanted = true;
    this.next();
  }

  // One picture at a time: what is asked for meanwhile is drawn when that is finished.
  next() {
    if (this.due || !this.wanted || !this.visible) return;
    this.due = true;
    requestAnimationFrame(async () => {
      this.wanted = false;
      try {
        if (!this.closed && this.draw) await this.frame(this.rest);
      } finally {
        this.due = false;
        this.next();
      }
    });
  }

  async frame(rest) {
    if (!rest) {
      await this.paint(this.detail);
      this.pace = this.detail === LEAST ? 0.7 * this.pace + 0.3 * this.took : 0;
      const factor = Math.sqrt(MOVING / this.took);
      if (factor < 0.85 || factor > 1.2) { // a size that changes all the time flickers
        this.detail = within(this.detail * Math.min(1.25, Math.max(0.7, factor)));
      }
      return;
    }
    if (this.stale || this.still > this.drawn) {
      await this.paint(this.still);
      this.still = within(this.drawn * Math.sqrt(AT_REST / this.took));
      if (this.wanted) return; // it has been turned meanwhile
      if (this.still > 1.15 * this.drawn) return this.later(true); // it is quicker than it seemed
    }
    this.canvas.dataset.state = "resting";
  }

  async paint(share) {
    const { gl, canvas } = this, begun = performance.now();
    const scale = share * Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(1, Math.round(canvas.clientWidth * scale));
    const height = Math.max(1, Math.round(canvas.clientHeight * scale));
    if (canvas.width !== width || canvas.height !== height) {
      Object.assign(canvas, { width, height });
    }
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    this.stale = false;
    this.draw(matricesOf(this.about, this.camera, width, height), width, height, this.camera.shape);
    await finished(gl);
    [this.drawn, this.took] = [share, Math.max(performance.now() - begun, 0.1)];
  }
}

// Until all that was drawn is finished, without holding up the page.
function finished(gl) {
  const fence = gl.fenceSync(gl.SYNC_GPU_COMMANDS_COMPLETE, 0);
  gl.flush();
  return new Promise((done) => {
    const look = () => {
      if (gl.clientWaitSync(fence, 0, 0) === gl.TIMEOUT_EXPIRED) return setTimeout(look, 1);
      gl.deleteSync(fence);
      done();
    };
    look();
  });
}

function steer(canvas, camera, scroll) {
  const down = new Map();
  const spread = () => {
    const [a, b] = [...down.values()];
    return Math.max(1, Math.hypot(a.x - b.x, a.y - b.y));
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, { x: event.clientX, y: event.clientY });
    camera.touched();
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = down.get(event.pointerId), now = { x: event.clientX, y: event.clientY };
    if (!last) return;
    if (down.size === 1) camera.turn(-(now.x - last.x) * 0.008, (now.y - last.y) * 0.008);
    const before = down.size === 2 && spread();
    down.set(event.pointerId, now);
    if (before) camera.closer(spread() / before);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => down.delete(event.pointerId));
  }
  canvas.addEventListener("wheel", (event) => {
    // else the page would not scroll on over the object
    if (!scroll && document.activeElement !== canvas && !event.ctrlKey) return;
    event.preventDefault();
    camera.closer(Math.exp(-event.deltaY * 0.001));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => camera.reset());
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0] };
    Object.assign(steps, { ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] });
    const factor = { "+": 1.1, "=": 1.1, "-": 1 / 1.1 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
    if (!steps[event.key] && !factor) return;
    event.preventDefault();
    camera.touched();
    if (factor) camera.closer(factor);
    else camera.turn(...steps[event.key]);
  });
}
