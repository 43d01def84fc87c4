// The selected sample: image, label of the crop, and heatmaps of its classes.

const NUM_SHOWN = 8; // classes shown of a label
const STRENGTH = 0.6; // opacity of heatmaps over an image; without an image they are opaque
const SPEAK_DELAY_MS = 500; // announce a label to screen readers only after a pause

const { classes, colors, opening, samples } = readIndex();
const current = { sample: null, map: null, strongest: [], box: opening.box };
const visible = new Set([0, 1, 2]); // ranks of the classes whose heatmaps are shown, for all samples
let speaking;

/** Return {map, image} of a sample: its decoded label map, and the data URL of its picture or null. */
function readSample(number) {
  const { map, image } = JSON.parse(document.getElementById(`sample-${number}`).textContent);
  const bytes = Uint8Array.from(atob(map), (character) => character.charCodeAt(0));
  return { map: decodeLabelMap(bytes), image: image && `data:image/jpeg;base64,${image}` };
}

function withColors(strongest) {
  return strongest.map((entry, rank) => ({ ...entry, color: colors[rank] }));
}

function drawThumbnail(number, element) {
  const { map, image } = readSample(number);
  const holder = element.querySelector(".thumbnail");
  if (image) {
    holder.append(make("img", { src: image, alt: "", decoding: "async" }));
  } else {
    const canvas = make("canvas", { "aria-hidden": "true" });
    canvas.style.aspectRatio = `${map.canvas[1]} / ${map.canvas[0]}`;
    paintHeatmaps(canvas, map, withColors(strongestClasses(map, colors.length)), 1);
    holder.append(canvas);
  }
}

function showSample(number) {
  const sample = samples[number];
  const { map, image } = readSample(number);
  Object.assign(current, { sample, map, strongest: withColors(strongestClasses(map, colors.length)), hasImage: !!image });
  document.getElementById("key").textContent = sample.key;
  const verdict =
    sample.label === sample.best ? "the map agrees" : `the map ranks ${sample.best} first, ${percent(sample.pBest)}`;
  document.getElementById("about").textContent =
    `Label: ${sample.label}, ${percent(sample.pLabel)} of the whole image; ${verdict}.`;
  const stage = document.getElementById("stage");
  stage.style.setProperty("--ratio", map.canvas[1] / map.canvas[0]);
  stage.classList.toggle("empty", !image);
  const picture = document.getElementById("picture");
  picture.hidden = !image;
  if (image) picture.src = image;
  picture.alt = image ? sample.key : "";
  document.getElementById("toggles").replaceChildren(...current.strongest.map(toggle));
  showHeatmaps();
  setBox(current.box);
}

function toggle({ index, highest, color }, rank) {
  const input = make("input", { type: "checkbox" });
  input.checked = visible.has(rank);
  input.addEventListener("change", () => {
    if (input.checked) visible.add(rank);
    else visible.delete(rank);
    showHeatmaps();
  });
  const label = make("label", { title: classes[index] });
  label.append(input, swatch(color), make("span", { class: "name" }, classes[index]), make("span", { class: "value" }, percent(highest)));
  return label;
}

function toggleAll(on) {
  colors.forEach((_, rank) => (on ? visible.add(rank) : visible.delete(rank)));
  document.querySelectorAll("#toggles input").forEach((input) => (input.checked = on));
  showHeatmaps();
}

function showHeatmaps() {
  const layers = current.strongest.filter((_, rank) => visible.has(rank));
  paintHeatmaps(document.getElementById("heatmap"), current.map, layers, current.hasImage ? STRENGTH : 1);
}

/** Return [index, probability] of the most probable classes of a label in order, and of the sample's original class. */
function ranked(soft) {
  const order = [...soft.keys()].sort((a, b) => soft[b] - soft[a]).slice(0, NUM_SHOWN);
  if (!order.includes(current.sample.labelIndex)) order.push(current.sample.labelIndex);
  return order.map((index) => [index, soft[index]]);
}

function showLabel(box) {
  current.box = box;
  const best = ranked(poolLabel(current.map, box));
  document.getElementById("label").replaceChildren(...best.map(([index, p]) => labelRow(index, p)));
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    const words = best.slice(0, 3).map(([index, p]) => `${classes[index]} ${percent(p)}`);
    document.getElementById("spoken").textContent = `Label of the crop: ${words.join(", ")}`;
  }, SPEAK_DELAY_MS);
}

function labelRow(index, p) {
  const row = make("li", { title: classes[index], "data-class": index });
  const color = current.strongest.find((entry) => entry.index === index)?.color;
  const bar = make("span", { class: "bar" });
  bar.append(make("span"));
  bar.firstChild.style.width = `${100 * p}%`;
  if (color) bar.style.setProperty("--swatch", `rgb(${color.join()})`);
  const name = make("span", { class: "name" }, classes[index]);
  const isLabel = index === current.sample.labelIndex;
  row.append(swatch(color), name, ...(isLabel ? [make("span", { class: "tag" }, "label")] : []));
  row.append(make("data", { class: "value", value: p }, percent(p)), bar);
  return row;
}

/** Paint the heatmaps of the label and of the suggestion, and return {image, size} of a sample. */
function drawSuspect(number, canvas) {
  const { map, image } = readSample(number);
  const { labelIndex, bestIndex } = samples[number];
  const heatmaps = strongestClasses(map, Infinity);
  const layers = [labelIndex, bestIndex].map((index, i) => ({ ...heatmaps.find((entry) => entry.index === index), color: colors[i] }));
  // The map may hold no heatmap of the label: it is one of the classes that hardly occur in the image.
  paintHeatmaps(canvas, map, layers.filter(({ heatmap }) => heatmap), image ? STRENGTH : 1);
  return { image, size: map.canvas };
}

document.getElementById("browser").hidden = false;
const setBox = makeCropBox(showLabel, () => current.map.canvas);
const gallery = makeGallery(samples, opening.sample, drawThumbnail, showSample);
makeFilters(samples, gallery.show);
makeSheet(samples, drawSuspect, colors, (number) => openSample(gallery, number));
document.getElementById("all").addEventListener("click", () => toggleAll(true));
document.getElementById("none").addEventListener("click", () => toggleAll(false));
