// Draws Gaussians (ply, the layout of 3DGS) or a mesh (glb with vertex colours) with WebGL 2, seen by
// a camera that the mouse or a finger turns. Axes are those of the runs: z up, the front on +x.
const FOVY = (40 * Math.PI) / 180;
const C0 = 0.28209479177387814;
const MAX_BYTES = 400e6;
const MOVING = 40, AT_REST = 900; // milliseconds that a frame may take
const FIRST = 0.15, LEAST = 0.1; // parts of the full size: of the first frame, and at least

// --- files ---------------------------------------------------------------------------------------

const AXES = { x: 0, y: 1, z: 2 };
const unit = (word) => [0, 1, 2].map((k) => (AXES[word[1]] === k ? (word[0] === "-" ? -1 : 1) : 0));
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

export function readPly(buffer) {
  const bytes = new Uint8Array(buffer, 0, Math.min(buffer.byteLength, 1 << 20));
  const head = new TextDecoder("latin1").decode(bytes);
  const end = head.indexOf("end_header\n");
  if (!head.startsWith("ply\n") || end < 0) throw new Error("this is not a ply file");
  const lines = head.slice(0, end).split("\n");
  if (!lines.includes("format binary_little_endian 1.0")) throw new Error("this ply is not binary");
  const count = Number((lines.find((l) => l.startsWith("element vertex ")) || "").split(" ")[2]);
  const properties = lines.filter((l) => l.startsWith("property ")).map((l) => l.split(" "));
  if (properties.some((p) => p[1] !== "float")) throw new Error("this ply holds no Gaussians");
  const column = Object.fromEntries(properties.map((p, k) => [p[2], k]));
  if (!("scale_0" in column && "rot_3" in column)) throw new Error("this ply holds no Gaussians");
  const wide = properties.length, start = end + "end_header\n".length;
  if (!(count > 0) || buffer.byteLength < start + 4 * wide * count) throw new Error("this ply is cut off");
  const data = new Float32Array(buffer.slice(start, start + 4 * wide * count));
  const said = lines.map((l) => /^comment front ([+-][xyz]) up ([+-][xyz])$/.exec(l)).find(Boolean);
  const front = unit(said ? said[1] : "+x"), up = unit(said ? said[2] : "+z");
  const turn = [front, cross(up, front), up]; // rows: our axes in those of the file
  return gaussians(data, count, wide, column, turn);
}

function gaussians(data, count, wide, column, turn) {
  const texels = new Float32Array(12 * count), centers = new Float32Array(3 * count);
  const at = (names) => names.map((name) => column[name]);
  const place = at(["x", "y", "z"]), color = at(["f_dc_0", "f_dc_1", "f_dc_2"]);
  const sizes = at(["scale_0", "scale_1", "scale_2"]), rot = at(["rot_0", "rot_1", "rot_2", "rot_3"]);
  for (let i = 0; i < count; i++) {
    const row = i * wide, p = place.map((c) => data[row + c]);
    let [w, x, y, z] = rot.map((c) => data[row + c]);
    const n = Math.hypot(w, x, y, z) || 1;
    w /= n; x /= n; y /= n; z /= n;
    const r = [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ];
    const s = sizes.map((c) => Math.exp(data[row + c]));
    // the factor of the covariance, in our axes
    const m = turn.map((t) => [0, 1, 2].map((k) => (t[0] * r[0][k] + t[1] * r[1][k] + t[2] * r[2][k]) * s[k]));
    const cov = (a, b) => m[a][0] * m[b][0] + m[a][1] * m[b][1] + m[a][2] * m[b][2];
    const c = turn.map((t) => t[0] * p[0] + t[1] * p[1] + t[2] * p[2]);
    centers.set(c, 3 * i);
    const opacity = 1 / (1 + Math.exp(-data[row + column.opacity]));
    const rgb = color.map((k) => Math.min(1, Math.max(0, 0.5 + C0 * data[row + k])));
    // colours as three bytes in one number
    const packed = Math.round(255 * rgb[0]) + 256 * Math.round(255 * rgb[1]) + 65536 * Math.round(255 * rgb[2]);
    texels.set([...c, opacity, cov(0, 0), cov(0, 1), cov(0, 2), cov(1, 1), cov(1, 2), cov(2, 2), packed, 0], 12 * i);
  }
  return { kind: "gaussians", count, texels, points: centers };
}

const COMPONENTS = { 5121: [Uint8Array, 1], 5123: [Uint16Array, 2], 5125: [Uint32Array, 4], 5126: [Float32Array, 4] };
const NUMBERS = { SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4 };

export function readGlb(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < 20 || view.getUint32(0, true) !== 0x46546c67) throw new Error("this is not a glb file");
  const length = view.getUint32(12, true);
  const json = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  const start = 20 + length + 8;
  const primitive = json.meshes[0].primitives[0];
  const read = (index) => {
    const accessor = json.accessors[index], piece = json.bufferViews[accessor.bufferView];
    const [Kind, size] = COMPONENTS[accessor.componentType], n = NUMBERS[accessor.type];
    const from = start + (piece.byteOffset || 0) + (accessor.byteOffset || 0);
    const stride = piece.byteStride || n * size;
    const out = new Kind(n * accessor.count), bytes = new Uint8Array(out.buffer);
    for (let i = 0; i < accessor.count; i++) {
      bytes.set(new Uint8Array(buffer, from + i * stride, n * size), i * n * size);
    }
    return { array: out, n, full: accessor.normalized ? 2 ** (8 * size) - 1 : 1 };
  };
  const position = read(primitive.attributes.POSITION), count = position.array.length / 3;
  const points = new Float32Array(3 * count), colors = new Float32Array(3 * count).fill(0.6);
  for (let i = 0; i < count; i++) { // y up, the front on +z
    const [x, y, z] = position.array.subarray(3 * i, 3 * i + 3);
    points.set([z, x, y], 3 * i);
  }
  if ("COLOR_0" in primitive.attributes) {
    const { array, n, full } = read(primitive.attributes.COLOR_0);
    for (let i = 0; i < count; i++) for (let k = 0; k < 3; k++) colors[3 * i + k] = array[n * i + k] / full;
  }
  const indices = "indices" in primitive
    ? new Uint32Array(read(primitive.indices).array)
    : Uint32Array.from({ length: count }, (_, i) => i);
  return { kind: "mesh", points, colors, normals: vertexNormals(points, indices), indices };
}

function vertexNormals(points, indices) {
  const normals = new Float32Array(points.length);
  for (let f = 0; f < indices.length; f += 3) {
    const [a, b, c] = [indices[f], indices[f + 1], indices[f + 2]];
    const side = (u, v) => [0, 1, 2].map((k) => points[3 * v + k] - points[3 * u + k]);
    const n = cross(side(a, b), side(a, c));
    for (const v of [a, b, c]) for (let k = 0; k < 3; k++) normals[3 * v + k] += n[k];
  }
  return normals;
}

export async function load(url, kind) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error("the file could not be read");
  const buffer = await answer.arrayBuffer();
  if (buffer.byteLength > MAX_BYTES) throw new Error("the object is too large for this page");
  return kind === "glb" ? readGlb(buffer) : readPly(buffer);
}

// --- drawing -------------------------------------------------------------------------------------

const SPLAT_VERTEX = `#version 300 es
precision highp float; precision highp sampler2D;
uniform sampler2D data; uniform mat4 view; uniform vec2 focal; uniform vec2 size; uniform float far;
in vec2 corner; in uint index;
out vec2 where; out vec4 color;
vec4 texel(uint k) { uint i = index * 3u + k; return texelFetch(data, ivec2(i % 3072u, i / 3072u), 0); }
void main() {
  vec4 a = texel(0u), b = texel(1u), c = texel(2u);
  vec3 p = (view * vec4(a.xyz, 1.0)).xyz;
  float z = -p.z;
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0);
  if (z < 0.02 * far || a.w < 1.0 / 255.0) return;
  mat3 cov = mat3(b.x, b.y, b.z, b.y, b.w, c.x, b.z, c.x, c.y);
  mat3 turned = mat3(view) * cov * transpose(mat3(view));
  vec2 lim = 1.3 * size / (2.0 * focal);
  vec2 t = clamp(p.xy / z, -lim, lim) * z;
  mat3x2 j = mat3x2(focal.x / z, 0.0, 0.0, focal.y / z, focal.x * t.x / (z * z), focal.y * t.y / (z * z));
  mat2 flat2 = j * turned * transpose(j);
  float xx = flat2[0][0] + 0.3, yy = flat2[1][1] + 0.3, xy = flat2[0][1];
  float middle = 0.5 * (xx + yy), apart = sqrt(max(0.25 * (xx - yy) * (xx - yy) + xy * xy, 1e-9));
  float l1 = middle + apart, l2 = max(middle - apart, 0.1);
  vec2 axis = abs(xy) < 1e-6 ? (xx >= yy ? vec2(1, 0) : vec2(0, 1)) : normalize(vec2(xy, l1 - xx));
  where = corner * sqrt(2.0 * log(255.0 * a.w)); // from here on it is not to be seen
  vec2 shift = where.x * min(sqrt(l1), 1024.0) * axis + where.y * min(sqrt(l2), 1024.0) * vec2(-axis.y, axis.x);
  vec2 ndc = 2.0 * focal * p.xy / (z * size) + 2.0 * shift / size;
  gl_Position = vec4(ndc, 0.0, 1.0);
  uint rgb = uint(c.z);
  color = vec4(float(rgb & 255u), float((rgb >> 8) & 255u), float(rgb >> 16), 255.0 * a.w) / 255.0;
}`;
const SPLAT_FRAGMENT = `#version 300 es
precision highp float;
in vec2 where; in vec4 color; out vec4 pixel;
void main() {
  float alpha = min(0.99, color.a * exp(-0.5 * dot(where, where)));
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(color.rgb * alpha, alpha);
}`;
const MESH_VERTEX = `#version 300 es
precision highp float;
uniform mat4 view; uniform vec2 focal; uniform vec2 size; uniform float far;
in vec3 position; in vec3 tint; in vec3 normal;
out vec3 color; out vec3 turned;
void main() {
  vec3 p = (view * vec4(position, 1.0)).xyz;
  float near = 0.01 * far;
  gl_Position = vec4(2.0 * focal * p.xy / size, -p.z * (far + near) / (far - near) - 2.0 * far * near / (far - near), -p.z);
  color = tint; turned = mat3(view) * normal;
}`;
const MESH_FRAGMENT = `#version 300 es
precision highp float;
in vec3 color; in vec3 turned; out vec4 pixel;
void main() { // linear colours as they are, a little darker where the surface turns away
  vec3 shown = mix(12.92 * color, 1.055 * pow(max(color, 1e-5), vec3(1.0 / 2.4)) - 0.055, step(0.0031308, color));
  pixel = vec4(shown * (0.82 + 0.18 * abs(normalize(turned).z)), 1.0);
}`;

function program(gl, vertex, fragment) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error("this browser cannot draw the object");
  return made;
}

// What several viewers look through. `zoom` is relative to the distance from which the object fits.
export class Camera {
  constructor() {
    this.listeners = new Set();
    this.reset();
  }
  reset() {
    Object.assign(this, { azimuth: 0.5, elevation: 0.26, zoom: 1 });
    this.changed();
  }
  turn(right, up) {
    this.azimuth -= right;
    this.elevation = Math.min(1.5, Math.max(-1.5, this.elevation + up));
    this.changed();
  }
  closer(factor) {
    this.zoom = Math.min(6, Math.max(0.3, this.zoom * factor));
    this.changed();
  }
  changed() {
    for (const listener of this.listeners) listener();
  }
}

export class Viewer {
  // Draws into a canvas. Throws where there is no WebGL 2.
  constructor(canvas, camera) {
    this.canvas = canvas;
    this.camera = camera;
    const options = { alpha: true, premultipliedAlpha: true, antialias: false, preserveDrawingBuffer: true };
    this.gl = canvas.getContext("webgl2", options);
    if (!this.gl) throw new Error("this browser has no WebGL 2");
    this.due = false;
    this.cost = null; // milliseconds of a frame at full size
    this.ask = () => {
      clearTimeout(this.rest);
      this.rest = setTimeout(() => !this.closed && this.draw(AT_REST), 160);
      if (this.due || this.closed) return;
      this.due = true;
      requestAnimationFrame(() => { this.due = false; if (!this.closed) this.draw(MOVING); });
    };
    camera.listeners.add(this.ask);
    this.sizes = new ResizeObserver(this.ask);
    this.sizes.observe(canvas);
    this.listen();
  }

  close() {
    this.closed = true;
    clearTimeout(this.rest);
    this.camera.listeners.delete(this.ask);
    this.sizes.disconnect();
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }

  listen() {
    const fingers = new Map(), canvas = this.canvas, camera = this.camera;
    canvas.addEventListener("pointerdown", (e) => {
      canvas.setPointerCapture(e.pointerId);
      fingers.set(e.pointerId, e);
    });
    canvas.addEventListener("pointermove", (e) => {
      const before = fingers.get(e.pointerId);
      if (!before) return;
      const apart = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
      if (fingers.size === 1) {
        camera.turn((e.clientX - before.clientX) * 0.009, (e.clientY - before.clientY) * 0.009);
        fingers.set(e.pointerId, e);
      } else if (fingers.size === 2) {
        const old = apart();
        fingers.set(e.pointerId, e);
        camera.closer(apart() / Math.max(1, old));
      }
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (e) => fingers.delete(e.pointerId));
    canvas.addEventListener("wheel", (e) => { e.preventDefault(); camera.closer(Math.exp(-0.001 * e.deltaY)); }, { passive: false });
    canvas.addEventListener("dblclick", () => camera.reset());
    canvas.addEventListener("keydown", (e) => {
      const keys = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
      if (e.key in keys) { camera.turn(...keys[e.key]); e.preventDefault(); }
      if (e.key === "+") camera.closer(1.1);
      if (e.key === "-") camera.closer(1 / 1.1);
    });
  }

  show(object) {
    this.object = object;
    this.frame();
    if (object.kind === "mesh") this.upMesh(); else this.upGaussians();
    this.ask();
  }

  // The middle and the radius of what is to be seen; a few stray points do not count.
  frame() {
    const points = this.object.points, n = points.length / 3;
    const every = Math.max(1, Math.floor(n / 20000));
    const middle = [0, 1, 2].map((k) => {
      const line = [];
      for (let i = 0; i < n; i += every) line.push(points[3 * i + k]);
      line.sort((a, b) => a - b);
      return (line[Math.round(0.01 * (line.length - 1))] + line[Math.round(0.99 * (line.length - 1))]) / 2;
    });
    const far = [];
    for (let i = 0; i < n; i += every) {
      far.push(Math.hypot(points[3 * i] - middle[0], points[3 * i + 1] - middle[1], points[3 * i + 2] - middle[2]));
    }
    far.sort((a, b) => a - b);
    this.middle = middle;
    const soft = this.object.kind === "gaussians" ? 1.25 : 1; // they reach further than their middles
    this.radius = soft * far[Math.round(0.99 * (far.length - 1))] || 1;
  }

  buffer(program, name, array, n) {
    const gl = this.gl, place = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, n, gl.FLOAT, false, 0, 0);
  }

  upMesh() {
    const gl = this.gl, { points, colors, normals, indices } = this.object;
    this.program = program(gl, MESH_VERTEX, MESH_FRAGMENT);
    this.array = gl.createVertexArray();
    gl.bindVertexArray(this.array);
    this.buffer(this.program, "position", points, 3);
    this.buffer(this.program, "tint", colors, 3);
    this.buffer(this.program, "normal", normals, 3);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
  }

  upGaussians() {
    const gl = this.gl, { texels, count } = this.object;
    this.program = program(gl, SPLAT_VERTEX, SPLAT_FRAGMENT);
    this.array = gl.createVertexArray();
    gl.bindVertexArray(this.array);
    this.buffer(this.program, "corner", new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), 2);
    this.order = gl.createBuffer();
    const place = gl.getAttribLocation(this.program, "index");
    gl.bindBuffer(gl.ARRAY_BUFFER, this.order);
    gl.bufferData(gl.ARRAY_BUFFER, 4 * count, gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribIPointer(place, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(place, 1);
    const rows = Math.ceil((3 * count) / 3072), padded = new Float32Array(4 * 3072 * rows);
    padded.set(texels);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, 3072, rows, 0, gl.RGBA, gl.FLOAT, padded);
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
  }

  // World to camera, with OpenGL's axes; a matrix as WebGL takes it, column after column.
  view() {
    const { azimuth, elevation, zoom } = this.camera;
    const [ca, sa, ce, se] = [Math.cos(azimuth), Math.sin(azimuth), Math.cos(elevation), Math.sin(elevation)];
    const distance = (1.08 * this.radius) / Math.sin(FOVY / 2) / zoom;
    const back = [ce * ca, ce * sa, se], right = [-sa, ca, 0], up = cross(back, right);
    const eye = back.map((b, k) => this.middle[k] + distance * b);
    const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
    const columns = [0, 1, 2].flatMap((k) => [right[k], up[k], back[k], 0]);
    return { matrix: [...columns, -dot(right, eye), -dot(up, eye), -dot(back, eye), 1], eye, back, distance };
  }

  // Draw a frame in about so many milliseconds, if need be at a smaller size: where there is no GPU,
  // a processor draws, which may be training meanwhile.
  draw(milliseconds) {
    const gl = this.gl, part = this.cost === null ? FIRST : Math.min(1, Math.max(LEAST, Math.sqrt(milliseconds / this.cost)));
    const begun = performance.now();
    this.paint(part);
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)); // waits for it
    if (this.object) this.cost = (performance.now() - begun) / part ** 2;
  }

  paint(part) {
    const gl = this.gl, canvas = this.canvas, sharp = 2 * part; // twice as fine: smooth edges
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((n) => Math.max(1, Math.round(n * sharp)));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!this.object) return;
    const { matrix, eye, back, distance } = this.view(), focal = Math.min(width, height) / 2 / Math.tan(FOVY / 2);
    gl.useProgram(this.program);
    gl.bindVertexArray(this.array);
    const set = (name) => gl.getUniformLocation(this.program, name);
    gl.uniformMatrix4fv(set("view"), false, matrix);
    gl.uniform2f(set("focal"), focal, focal);
    gl.uniform2f(set("size"), width, height);
    gl.uniform1f(set("far"), distance + 4 * this.radius);
    if (this.object.kind === "mesh") {
      gl.enable(gl.DEPTH_TEST);
      gl.disable(gl.BLEND);
      gl.drawElements(gl.TRIANGLES, this.object.indices.length, gl.UNSIGNED_INT, 0);
    } else {
      gl.disable(gl.DEPTH_TEST);
      gl.enable(gl.BLEND);
      gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      gl.bindBuffer(gl.ARRAY_BUFFER, this.order);
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, this.farFirst(eye, back));
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.object.count);
    }
  }

  // The numbers of the Gaussians, the farthest first: sorted by counting, in 65,536 steps of depth.
  farFirst(eye, back) {
    const { points, count } = this.object, depths = new Float32Array(count);
    let least = Infinity, most = -Infinity;
    for (let i = 0; i < count; i++) {
      const d = points[3 * i] * back[0] + points[3 * i + 1] * back[1] + points[3 * i + 2] * back[2];
      depths[i] = d;
      if (d < least) least = d;
      if (d > most) most = d;
    }
    const scale = 65535 / Math.max(most - least, 1e-9), starts = new Uint32Array(65537), steps = new Uint16Array(count);
    for (let i = 0; i < count; i++) {
      steps[i] = (depths[i] - least) * scale; // small: far from the eye
      starts[steps[i] + 1]++;
    }
    for (let k = 0; k < 65536; k++) starts[k + 1] += starts[k];
    const order = new Uint32Array(count);
    for (let i = 0; i < count; i++) order[starts[steps[i]]++] = i;
    return order;
  }
}
