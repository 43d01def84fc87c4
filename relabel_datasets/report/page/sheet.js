// The sheet of suspect labels: one image at a time, the most suspect first.

/**
 * Fill the sheet, and let the user turn its pages by button, click or key.
 *
 * @param samples All samples of the index.
 * @param draw Called with the number of a sample and a canvas to paint over its image. Returns {image, size}: data URL or null, [height, width].
 * @param colors Colors of the label and of the suggestion.
 * @param onOpen Called with the number of a sample to show among the samples.
 */
function makeSheet(samples, draw, colors, onOpen) {
  const numbers = [...samples.keys()].filter((number) => samples[number].best !== samples[number].label && samples[number].margin < 0);
  numbers.sort((a, b) => samples[a].margin - samples[b].margin);
  if (!numbers.length) return;
  const element = (name) => document.getElementById(`sheet-${name}`);
  const sheet = document.getElementById("sheet");
  let position;

  function show(wanted) {
    position = clamp(wanted, 0, numbers.length - 1);
    const { key, label, best, pLabel, pBest, margin } = samples[numbers[position]];
    const { image, size } = draw(numbers[position], element("heatmap"));
    element("picture").hidden = !image;
    if (image) element("picture").src = image;
    element("picture").alt = image ? key : "";
    element("image").style.setProperty("--ratio", size[1] / size[0]);
    const texts = { key, label, best, p_label: percent(pLabel), p_best: percent(pBest), margin: signed(margin), count: `${position + 1} of ${numbers.length}` };
    for (const [name, text] of Object.entries(texts)) element(name).textContent = text;
  }

  const turn = { ArrowLeft: () => position - 1, ArrowRight: () => position + 1, Home: () => 0, End: () => numbers.length - 1 };
  sheet.addEventListener("keydown", (event) => {
    if (!(event.key in turn) || event.ctrlKey || event.altKey || event.metaKey) return;
    show(turn[event.key]());
    event.preventDefault();
  });
  element("previous").addEventListener("click", () => show(position - 1));
  for (const name of ["next", "image"]) element(name).addEventListener("click", () => show(position + 1));
  element("open").addEventListener("click", () => onOpen(numbers[position]));
  for (const [i, name] of ["label", "best"].entries()) element(name).before(swatch(colors[i]));
  sheet.hidden = false;
  show(0);
}

function signed(number) {
  return number.toFixed(2).replace("-", "\u2212");
}

function percent(p) {
  return `${(100 * p).toFixed(1)}%`;
}

function swatch(color) {
  const element = make("span", { class: "swatch" });
  if (color) element.style.setProperty("--swatch", `rgb(${color.join()})`);
  return element;
}
