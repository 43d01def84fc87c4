// The image with heatmaps and a crop box that is controlled by mouse, touch, keyboard or numbers.

const EDGES = ["left", "top", "right", "bottom"]; // names of the edges of a box [x1, y1, x2, y2]
const MIN_SIDE = 0.01; // shortest side of a box, as a share of the image
const KEY_STEP = 0.02; // step of an arrow key, as a share of the image
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Paint heatmaps of classes, each in its color, with opacity proportional to the probability. */
function paintHeatmaps(canvas, map, layers, strength) {
  canvas.width = map.width;
  canvas.height = map.height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(map.width, map.height);
  for (let location = 0; location < map.width * map.height; location++) {
    const mixed = [0, 0, 0];
    let total = 0; // at most 1: these are probabilities of different classes
    for (const { heatmap, color } of layers) {
      total += heatmap[location];
      color.forEach((value, channel) => (mixed[channel] += heatmap[location] * value));
    }
    const rgb = mixed.map((value) => value / (total || 1));
    image.data.set([...rgb, 255 * strength * Math.min(total, 1)], 4 * location);
  }
  context.putImageData(image, 0, 0);
}

/** Move a box by (dx, dy), at most to the edge of the image. */
function moved([x1, y1, x2, y2], dx, dy) {
  const shift = (start, end, by) => Math.min(Math.max(by, -start), 1 - end);
  const [x, y] = [shift(x1, x2, dx), shift(y1, y2, dy)];
  return [x1 + x, y1 + y, x2 + x, y2 + y];
}

/** Move the named edges of a box by (dx, dy), at most to the opposite edges. */
function resized(box, edges, dx, dy) {
  const result = [...box];
  for (const edge of edges) {
    const i = EDGES.indexOf(edge);
    const opposite = box[(i + 2) % 4];
    const wanted = box[i] + (i % 2 ? dy : dx);
    result[i] = i < 2 ? clamp(wanted, 0, opposite - MIN_SIDE) : clamp(wanted, opposite + MIN_SIDE, 1);
  }
  return result;
}

/** Return the box of a RandomResizedCrop, aligned to the pixels of the image. */
function randomCrop([height, width]) {
  for (let tries = 0; tries < 10; tries++) {
    const area = height * width * (0.08 + 0.92 * Math.random());
    const ratio = Math.exp(Math.log(4 / 3) * (2 * Math.random() - 1));
    const w = Math.round(Math.sqrt(area * ratio));
    const h = Math.round(Math.sqrt(area / ratio));
    if (0 < w && w <= width && 0 < h && h <= height) {
      const x = Math.floor(Math.random() * (width - w + 1));
      const y = Math.floor(Math.random() * (height - h + 1));
      return [x / width, y / height, (x + w) / width, (y + h) / height];
    }
  }
  return [0, 0, 1, 1];
}

function clamp(value, low, high) {
  return Math.max(low, Math.min(high, value));
}

/** Let the user move the box, call `onChange` with each new box, and return a function that sets it. */
function makeCropBox(onChange, canvasSize) {
  const [stage, frame, shade] = ["stage", "box", "shade"].map((id) => document.getElementById(id));
  const inputs = EDGES.map((edge) => document.getElementById(edge));
  let box;
  let drag = null;

  function set(wanted) {
    box = wanted;
    frame.dataset.box = box.join(" "); // exact value, for tests
    const [x1, y1, x2, y2] = box.map((value) => `${100 * value}%`);
    for (const { style } of [frame, shade]) {
      [style.left, style.top, style.width, style.height] = [x1, y1, `calc(${x2} - ${x1})`, `calc(${y2} - ${y1})`];
    }
    inputs.forEach((input, i) => (input.value = String(Math.round(1000 * box[i]) / 10)));
    onChange(box);
  }

  const at = (event) => {
    const { left, top, width, height } = stage.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height];
  };
  stage.addEventListener("pointerdown", (event) => {
    const start = at(event);
    if (event.button !== 0 || drag) return;
    if (event.target.dataset.edges) {
      drag = { start, box, edges: event.target.dataset.edges.split(" ") };
    } else if (event.target === frame) {
      drag = { start, box, edges: [] };
    } else if (event.pointerType === "touch") {
      return; // scroll the page
    } else {
      drag = { start, box: null, edges: [] };
    }
    drag.pointer = event.pointerId;
    stage.setPointerCapture(event.pointerId);
    frame.focus({ preventScroll: true });
    event.preventDefault();
  });
  stage.addEventListener("pointermove", (event) => {
    if (drag?.pointer !== event.pointerId) return;
    const [x, y] = at(event);
    const [dx, dy] = [x - drag.start[0], y - drag.start[1]];
    if (drag.box && drag.edges.length) set(resized(drag.box, drag.edges, dx, dy));
    else if (drag.box) set(moved(drag.box, dx, dy));
    else set(drawn(drag.start, [x, y]));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    stage.addEventListener(end, (event) => {
      if (drag?.pointer === event.pointerId) drag = null;
    });
  }
  frame.addEventListener("keydown", (event) => {
    const arrow = ARROWS[event.key];
    if (!arrow || event.ctrlKey || event.altKey || event.metaKey) return;
    const by = arrow.map((direction) => direction * KEY_STEP);
    set(event.shiftKey ? resized(box, ["right", "bottom"], ...by) : moved(box, ...by));
    event.preventDefault();
  });
  inputs.forEach((input, i) => input.addEventListener("change", () => set(typed(box, i, input.valueAsNumber / 100))));
  document.getElementById("numbers").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("whole").addEventListener("click", () => set([0, 0, 1, 1]));
  document.getElementById("random").addEventListener("click", () => set(randomCrop(canvasSize())));
  return set;
}

/** Move edge `i` to `value`, and the opposite edge if necessary. NaN changes nothing. */
function typed(box, i, value) {
  if (Number.isNaN(value)) return box;
  const result = [...box];
  const opposite = (i + 2) % 4;
  if (i < 2) {
    result[i] = clamp(value, 0, 1 - MIN_SIDE);
    result[opposite] = Math.max(result[opposite], result[i] + MIN_SIDE);
  } else {
    result[i] = clamp(value, MIN_SIDE, 1);
    result[opposite] = Math.min(result[opposite], result[i] - MIN_SIDE);
  }
  return result;
}

/** Return the box between two points, with sides of at least `MIN_SIDE`. */
function drawn([xa, ya], [xb, yb]) {
  const side = (a, b) => {
    const low = clamp(Math.min(a, b), 0, 1 - MIN_SIDE);
    return [low, clamp(Math.max(a, b), low + MIN_SIDE, 1)];
  };
  const [[x1, x2], [y1, y2]] = [side(xa, xb), side(ya, yb)];
  return [x1, y1, x2, y2];
}
