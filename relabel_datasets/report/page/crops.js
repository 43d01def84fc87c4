// The selected sample of a page of stored crops: image, boxes, and the label of the selected crop.

const SVG = "http://www.w3.org/2000/svg";
const CROP_SIDE = 224; // pixels of the canvas that shows a crop

const { classes, colors, opening, samples } = readIndex();
const current = { sample: null, data: null, crop: opening.crop };

/** Return {image, size, boxes, flips, labels, mean} of a sample; boxes are [left, top, right, bottom] in pixels of the original image. */
function readSample(number) {
  const data = JSON.parse(document.getElementById(`sample-${number}`).textContent);
  return { ...data, image: data.image && `data:image/jpeg;base64,${data.image}` };
}

function drawThumbnail(number, element) {
  const { image } = readSample(number);
  if (image) element.querySelector(".thumbnail").append(make("img", { src: image, alt: "", decoding: "async" }));
}

function showSample(number) {
  const [sample, data] = [samples[number], readSample(number)];
  Object.assign(current, { sample, data });
  document.getElementById("key").textContent = sample.key;
  document.getElementById("about").textContent =
    `Label: ${sample.label}, ${percent(sample.pLabel)} of the mean label, which ${sample.label === sample.best ? "agrees" : `ranks ${sample.best} first, ${percent(sample.pBest)}`}.`;
  const [height, width] = data.size;
  const stage = document.getElementById("stage");
  stage.style.setProperty("--ratio", width / height);
  stage.classList.toggle("empty", !data.image);
  const picture = document.getElementById("picture");
  picture.hidden = !data.image;
  if (data.image) picture.src = data.image;
  picture.onload = () => showCrop(current.crop); // the canvas needs the decoded picture
  const svg = document.getElementById("boxes");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);
  const order = [...data.boxes.keys()].sort((a, b) => area(data.boxes[b]) - area(data.boxes[a])); // small ones on top
  svg.replaceChildren(...order.map((crop) => rectangle(crop, data)));
  showCrop(Math.min(Math.max(current.crop, 0), data.boxes.length - 1));
}

function rectangle(crop, { boxes, flips }) {
  const [x1, y1, x2, y2] = boxes[crop];
  const rect = document.createElementNS(SVG, "rect");
  const attributes = { x: x1, y: y1, width: x2 - x1, height: y2 - y1, role: "button", "data-crop": crop };
  for (const [name, value] of Object.entries(attributes)) rect.setAttribute(name, value);
  rect.setAttribute("aria-label", `Crop ${crop + 1}${flips[crop] ? ", mirrored" : ""}`);
  rect.addEventListener("click", () => showCrop(crop));
  return rect;
}

/** Show a crop and its label, or the mean label of all crops for -1. */
function showCrop(crop) {
  current.crop = crop;
  const { data } = current;
  const isMean = crop < 0;
  const flip = !isMean && data.flips[crop];
  document.getElementById("label-title").textContent = isMean
    ? `Mean label of ${data.boxes.length} crops`
    : `Label of crop ${crop + 1} of ${data.boxes.length}${flip ? ", mirrored" : ""}`;
  for (const rect of document.querySelectorAll("#boxes rect")) {
    rect.classList.toggle("selected", Number(rect.dataset.crop) === crop);
  }
  document.getElementById("label").replaceChildren(...(isMean ? data.mean : data.labels[crop]).map(labelRow));
  const canvas = document.getElementById("crop");
  canvas.hidden = isMean || !data.image;
  if (!canvas.hidden) paintCrop(canvas, document.getElementById("picture"), data.boxes[crop], data.size, flip);
}

function paintCrop(canvas, picture, [x1, y1, x2, y2], [height, width], flip) {
  canvas.width = CROP_SIDE;
  canvas.height = CROP_SIDE;
  const context = canvas.getContext("2d");
  const [sx, sy] = [picture.naturalWidth / width, picture.naturalHeight / height];
  if (!picture.complete || !sx) return;
  if (flip) context.setTransform(-1, 0, 0, 1, CROP_SIDE, 0);
  context.drawImage(picture, x1 * sx, y1 * sy, (x2 - x1) * sx, (y2 - y1) * sy, 0, 0, CROP_SIDE, CROP_SIDE);
}

function labelRow([index, p]) {
  const row = make("li", { title: classes[index], "data-class": index });
  const bar = make("span", { class: "bar" });
  bar.append(make("span"));
  bar.firstChild.style.width = `${100 * p}%`;
  const isLabel = index === current.sample.labelIndex;
  row.append(make("span", { class: "swatch" }), make("span", { class: "name" }, classes[index]));
  row.append(...(isLabel ? [make("span", { class: "tag" }, "label")] : []));
  row.append(make("data", { class: "value", value: p }, percent(p)), bar);
  return row;
}

function step(by) {
  const count = current.data.boxes.length;
  showCrop((Math.max(current.crop, 0) + by + count) % count);
}

document.getElementById("browser").hidden = false;
const gallery = makeGallery(samples, opening.sample, drawThumbnail, showSample);
makeFilters(samples, gallery.show);
makeSheet(samples, readSample, colors, (number) => openSample(gallery, number));
document.getElementById("previous").addEventListener("click", () => step(-1));
document.getElementById("next").addEventListener("click", () => step(1));
document.getElementById("mean").addEventListener("click", () => showCrop(-1));
