// Draws the objects of a page: Gaussians as splats, meshes with the colours of their vertices.
// All canvases of a page share one camera, so that several objects turn together. z is up, the
// front is on +x. Nothing is fetched: an object lies in the page, deflated, in base64.
"use strict";
(() => {
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
  // the covariance on the screen, in pixels (Zwicker et al., EWA splatting)
  float z = -seen.z;
  mat3 jacobian = mat3(focal.x / z, 0.0, 0.0, 0.0, focal.y / z, 0.0,
    focal.x * seen.x / (z * z), focal.y * seen.y / (z * z), 0.0);
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
  if (a.w < 0.004) return;
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

  const camera = { azimuth: 0.5, lift: 0, zoom: 1, shape: 0, turning: true };
  const all = [];
  const LEAST_DETAIL = 0.3;
  const redraw = () => all.forEach((one) => one.ask());

  async function unpack(element) {
    const text = atob(element.textContent.trim());
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

  // Bytes: centres (3 u16), logarithms of the standard deviations (3 u8), quaternions wxyz (4 i8),
  // colour and opacity (4 u8); each kind for all Gaussians, one after the other.
  function splats(gl, buffer, about) {
    const n = about.count;
    const at = positions(buffer, 0, about);
    const sizes = new Uint8Array(buffer, 6 * n, 3 * n);
    const turns = new Int8Array(buffer, 9 * n, 4 * n);
    const colors = new Uint8Array(buffer, 13 * n, 4 * n);
    const rows = Math.max(1, Math.ceil((4 * n) / 2048));
    const table = new Float32Array(rows * 2048 * 4);
    const [least, most] = about.sizes;
    for (let i = 0; i < n; i++) {
      const s = [0, 1, 2].map((k) => Math.exp(2 * (least + (sizes[3 * i + k] / 255) * (most - least))));
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

    return (matrices, towards, focal, width, height) => {
      sort(...towards);
      gl.uniformMatrix4fv(of("view"), false, matrices.view);
      gl.uniformMatrix4fv(of("projection"), false, matrices.projection);
      gl.uniform2f(of("focal"), focal, focal);
      gl.uniform2f(of("viewport"), width, height);
      gl.drawElements(gl.TRIANGLES, 6 * n, gl.UNSIGNED_INT, 0);
    };
  }

  // --- meshes ----------------------------------------------------------------------------------

  // Bytes: corners of triangles (3 i32 each, as differences), positions (3 u16), colours (3 u8).
  function mesh(gl, buffer, about) {
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
    return (matrices) => {
      gl.uniformMatrix4fv(of("view"), false, matrices.view);
      gl.uniformMatrix4fv(of("projection"), false, matrices.projection);
      gl.uniform1f(of("shape"), camera.shape);
      gl.drawElements(gl.TRIANGLES, corners.length, gl.UNSIGNED_INT, 0);
    };
  }

  // --- the camera ------------------------------------------------------------------------------

  function matricesOf(about, width, height) {
    const elevation = Math.min(1.5, Math.max(-1.5, about.elevation + camera.lift));
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
    return { view, projection, focal, towards: back };
  }

  async function show(stage) {
    const canvas = stage.querySelector("canvas");
    const data = document.getElementById(stage.dataset.object);
    const about = JSON.parse(data.dataset.about);
    const buffer = await unpack(data);
    let gl, draw, asked = false, visible = true;
    // the share of the canvas's pixels that is drawn, along a side: less while it moves, if that
    // is slow (a phone, or a browser that draws with the processor), and more once it rests
    let detail = LEAST_DETAIL, still = 1, slow = false;
    let resting = false, drawnAt = 0, settling = 0;

    function begin() {
      const antialias = about.kind === "mesh";
      gl = canvas.getContext("webgl2", { alpha: true, antialias, premultipliedAlpha: true });
      if (!gl) throw new Error("this browser has no WebGL 2");
      draw = (about.kind === "splats" ? splats : mesh)(gl, buffer, about);
    }
    function frame(now) {
      asked = false;
      const gap = now - drawnAt;
      drawnAt = now;
      if (!resting && gap > 60 && gap < 1000) detail = Math.max(LEAST_DETAIL, detail * 0.85);
      paint(resting ? still : detail);
      stage.classList.toggle("resting", resting);
      clearTimeout(settling);
      if (!resting) settling = setTimeout(() => ask(true), 200);
    }
    function paint(share) {
      const scale = share * Math.min(window.devicePixelRatio || 1, 2);
      const width = Math.max(1, Math.round(canvas.clientWidth * scale));
      const height = Math.max(1, Math.round(canvas.clientHeight * scale));
      if (canvas.width !== width || canvas.height !== height) {
        canvas.width = width;
        canvas.height = height;
      }
      gl.viewport(0, 0, width, height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      const matrices = matricesOf(about, width, height);
      draw(matrices, matrices.towards, matrices.focal, width, height);
    }
    // how long a small picture takes, or if that is little a full one, from which the sizes follow:
    // about 25 ms while it moves, and up to 400 ms once it rests
    async function measure() {
      const finished = () => new Promise((done) => {
        const fence = gl.fenceSync(gl.SYNC_GPU_COMMANDS_COMPLETE, 0);
        gl.flush();
        const look = () => {
          if (gl.clientWaitSync(fence, 0, 0) === gl.TIMEOUT_EXPIRED) setTimeout(look, 1);
          else done();
        };
        look();
      });
      const time = async (share) => {
        const begun = performance.now();
        paint(share);
        await finished();
        return Math.max(performance.now() - begun, 0.1);
      };
      await time(LEAST_DETAIL); // the first one prepares the program too
      stage.classList.add("drawn");
      let tried = LEAST_DETAIL, cost = await time(tried);
      if (cost < 30) {
        tried = 1;
        cost = await time(tried);
      }
      slow = tried < 1 && cost > 100;
      const share = (limit) => Math.min(1, Math.max(LEAST_DETAIL, tried * Math.sqrt(limit / cost)));
      detail = share(25);
      still = share(400);
    }
    const ask = (rest = false) => {
      resting = rest;
      if (!rest) stage.classList.remove("resting");
      if (asked || !visible) return;
      asked = true;
      requestAnimationFrame(frame);
    };
    begin();
    steer(canvas);
    await measure();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => { begin(); ask(); });
    new ResizeObserver(() => ask()).observe(canvas);
    new IntersectionObserver((seen) => {
      visible = seen[seen.length - 1].isIntersecting;
      ask();
    }).observe(canvas);
    all.push({ ask, visible: () => visible, slow: () => slow });
    ask();
  }

  function halt() {
    camera.turning = false;
    label();
  }

  function steer(canvas) {
    const down = new Map();
    let apart = 0;
    const spread = () => {
      const [a, b] = [...down.values()];
      return Math.hypot(a.x - b.x, a.y - b.y);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (down.size === 2) apart = spread();
      halt();
    });
    canvas.addEventListener("pointermove", (event) => {
      const last = down.get(event.pointerId);
      if (!last) return;
      const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
      down.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (down.size === 2) {
        const now = spread();
        zoom(now / Math.max(apart, 1));
        apart = now;
      } else {
        turn(-dx * 0.008, dy * 0.008);
      }
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => down.delete(event.pointerId));
    }
    canvas.addEventListener("wheel", (event) => {
      // else the page scrolls on over the object
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * 0.001));
    }, { passive: false });
    canvas.addEventListener("dblclick", reset);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
      if (step[event.key]) turn(...step[event.key]);
      else if (event.key === "+" || event.key === "=") zoom(1.1);
      else if (event.key === "-") zoom(1 / 1.1);
      else return;
      event.preventDefault();
      halt();
    });
  }

  function turn(right, up) {
    camera.azimuth += right;
    camera.lift = Math.min(2, Math.max(-2, camera.lift + up));
    redraw();
  }
  function zoom(factor) {
    camera.zoom = Math.min(8, Math.max(0.25, camera.zoom * factor));
    redraw();
  }
  function reset() {
    Object.assign(camera, { azimuth: 0.5, lift: 0, zoom: 1 });
    redraw();
  }

  let last = 0;
  function tick(now) {
    if (!camera.turning) return;
    if (all.some((one) => one.slow())) return halt(); // by hand it is bearable
    if (last && all.some((one) => one.visible())) {
      camera.azimuth += Math.min(now - last, 100) * 0.0003;
      redraw();
    }
    last = now;
    requestAnimationFrame(tick);
  }
  const buttons = (name) => document.querySelectorAll(`button[data-do="${name}"]`);
  function label() {
    buttons("turn").forEach((button) => { button.textContent = camera.turning ? "Stop" : "Turn"; });
  }
  const actions = {
    turn() {
      camera.turning = !camera.turning;
      last = 0;
      if (camera.turning) requestAnimationFrame(tick);
      label();
    },
    shape() {
      camera.shape = 1 - camera.shape;
      buttons("shape").forEach((b) => { b.textContent = camera.shape ? "Colours" : "Shape"; });
      redraw();
    },
    ground() {
      const grounds = ["white", "grey", "black"];
      document.querySelectorAll(".stage").forEach((stage) => {
        const now = grounds.findIndex((name) => stage.classList.contains(name));
        stage.classList.remove(...grounds);
        stage.classList.add(grounds[(now + 1) % 3]);
      });
    },
    reset,
  };

  async function begin() {
    camera.turning = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    const stages = [...document.querySelectorAll(".stage[data-object]")];
    for (const stage of stages) {
      try {
        await show(stage);
      } catch (error) {
        stage.querySelector(".said").textContent = `The object cannot be drawn here: ${error.message}`;
      }
    }
    if (!all.length) return;
    document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
    for (const [name, action] of Object.entries(actions)) {
      buttons(name).forEach((button) => button.addEventListener("click", action));
    }
    label();
    if (camera.turning) requestAnimationFrame(tick);
  }
  begin();
})();
