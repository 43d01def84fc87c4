// Decode label maps (see labels/codec.py) and pool them (see labels/pooling.py) in the browser.
//
// A map is {logits, classes, base, count, height, width, numClasses, canvas}. `logits` has K x H x W values, K = `count` per
// location. `classes` has K indices if there is a base (heatmaps), else K x H x W (topk).

const NUM_BYTES = { U8: 1, U16: 2, U32: 4, F16: 2 };

function float16(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
}

/** Parse safetensors bytes into tensors and metadata. */
function readSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const { __metadata__: metadata, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    const size = NUM_BYTES[dtype];
    const values = new Float64Array((end - begin) / size);
    for (let i = 0; i < values.length; i++) {
      const offset = start + begin + i * size;
      const bits =
        size === 1 ? view.getUint8(offset) : size === 2 ? view.getUint16(offset, true) : view.getUint32(offset, true);
      values[i] = dtype === "F16" ? float16(bits) : bits;
    }
    tensors[name] = { values, shape };
  }
  return { tensors, metadata: JSON.parse(metadata.relabel) };
}

/** Return the first `count` 4-bit levels: the low halves of all bytes, then the high halves. */
function unpack(stored, count) {
  const levels = new Float64Array(2 * stored.length);
  stored.forEach((byte, i) => {
    levels[i] = byte & 15;
    levels[stored.length + i] = byte >> 4;
  });
  return levels.subarray(0, count);
}

function decodeLabelMap(bytes) {
  const { tensors, metadata } = readSafetensors(bytes);
  const numClasses = metadata.num_classes;
  const classes = tensors.classes.values;
  const count = tensors.classes.shape[0];
  const [, height, width] = tensors.logits.shape;
  const area = height * width;
  let logits = tensors.logits.values;
  let base = tensors.base?.values ?? null;
  if (tensors.ranges) {
    const isPacked = base !== null && base.length !== numClasses;
    const ranges = tensors.ranges.values;
    const scale = (levels, row, first, length) => {
      const low = ranges[2 * row];
      const step = (ranges[2 * row + 1] - low) / (isPacked ? 15 : 255);
      for (let i = first; i < first + length; i++) levels[i] = low + levels[i] * step;
    };
    if (isPacked) {
      logits = unpack(logits, count * area);
      base = unpack(base, numClasses);
    }
    for (let k = 0; k < count; k++) scale(logits, k, k * area, area);
    if (base) scale(base, count, 0, numClasses);
  }
  if (base) {
    for (let k = 0; k < count; k++) base[classes[k]] = mean(logits.subarray(k * area, (k + 1) * area));
  }
  return { logits, classes, base, count, height, width, numClasses, canvas: metadata.canvas };
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** Return the class of logit `i` of K x H x W. */
function classAt(map, i) {
  return map.base ? map.classes[Math.floor(i / (map.height * map.width))] : map.classes[i];
}

/** Return the RoIAlign weights of `length` locations for the side of a box from `start` to `end`, in 0..1 of the image. */
function lineWeights(start, end, length) {
  // Round to float32 as PyTorch does: the number of points jumps if a side is a whole number of locations.
  const round = Math.fround;
  const inLocations = (value) => round(round(round(value) * length) - 0.5);
  let position = inLocations(start);
  const extent = round(inLocations(end) - position);
  const numPoints = Math.max(1, Math.ceil(extent));
  const step = extent / numPoints;
  const weights = new Float64Array(length);
  position += step / 2;
  for (let point = 0; point < numPoints; point++, position += step) {
    const inside = Math.min(Math.max(position, 0), length - 1);
    const location = Math.min(Math.floor(inside), length - 1);
    weights[location] += (1 - (inside - location)) / numPoints;
    if (inside > location) weights[location + 1] += (inside - location) / numPoints;
  }
  return weights;
}

/** Return the probability of each class in a box [x1, y1, x2, y2] in 0..1 of the image, as LabelPooling does. */
function poolLabel(map, [x1, y1, x2, y2]) {
  const rows = lineWeights(y1, y2, map.height);
  const columns = lineWeights(x1, x2, map.width);
  const pooled = map.base ? Float64Array.from(map.base) : new Float64Array(map.numClasses);
  let i = 0;
  for (let k = 0; k < map.count; k++) {
    for (const row of rows) {
      for (const column of columns) {
        const index = classAt(map, i);
        pooled[index] += row * column * (map.logits[i++] - (map.base ? map.base[index] : 0));
      }
    }
  }
  return softmax(pooled);
}

function softmax(logits) {
  const highest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((value) => Math.exp(value - highest));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

/**
 * Return up to `maxClasses` stored classes as [{index, highest, heatmap}], sorted by decreasing highest probability at any
 * location. A heatmap has the probability of the class at each of the H x W locations.
 */
function strongestClasses(map, maxClasses) {
  const area = map.height * map.width;
  const base = map.base ?? new Float64Array(map.numClasses);
  const logits = new Map(); // class -> logit at each location
  for (let i = 0; i < map.logits.length; i++) {
    const index = classAt(map, i);
    if (!logits.has(index)) logits.set(index, new Float64Array(area).fill(base[index]));
    logits.get(index)[i % area] = map.logits[i];
  }
  const rest = base.filter((_, index) => !logits.has(index)); // classes with the same logit at all locations
  const highestOfRest = rest.reduce((a, b) => Math.max(a, b), -Infinity);
  const sumOfRest = rest.reduce((sum, value) => sum + Math.exp(value - highestOfRest), 0);
  const entries = [...logits.keys()].map((index) => ({ index, highest: 0, heatmap: new Float64Array(area) }));
  for (let location = 0; location < area; location++) {
    let highest = highestOfRest;
    for (const values of logits.values()) highest = Math.max(highest, values[location]);
    let total = sumOfRest * Math.exp(highestOfRest - highest);
    for (const values of logits.values()) total += Math.exp(values[location] - highest);
    for (const entry of entries) {
      entry.heatmap[location] = Math.exp(logits.get(entry.index)[location] - highest) / total;
      entry.highest = Math.max(entry.highest, entry.heatmap[location]);
    }
  }
  return entries.sort((a, b) => b.highest - a.highest || a.index - b.index).slice(0, maxClasses);
}
