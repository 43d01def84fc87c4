// The list of filtered samples. Thumbnails are drawn when they scroll into view.

const CHUNK = 60; // list items added at a time

/**
 * Create the list.
 *
 * @param samples All samples of the index.
 * @param opening Number of the sample that is selected first.
 * @param draw Called with the number of a sample and its element when it first scrolls into view.
 * @param onSelect Called with the number of the selected sample.
 * @returns {show, select}: `show` displays samples by number; `select` selects a displayed sample by position.
 */
function makeGallery(samples, opening, draw, onSelect) {
  const list = document.getElementById("gallery");
  let numbers = [];
  let position = -1; // position of the selected sample in `numbers`
  let selected = opening; // number of the selected sample

  const inView = new IntersectionObserver(
    (entries) => {
      // An element that scrolled in, out and in again has several entries.
      const visible = new Set(entries.filter(({ isIntersecting }) => isIntersecting).map(({ target }) => target));
      for (const target of visible) {
        inView.unobserve(target);
        draw(Number(target.dataset.number), target);
        if (target === list.lastElementChild) grow();
      }
    },
    { root: list, rootMargin: "300px" },
  );

  function grow(minLength = 0) {
    const end = Math.min(numbers.length, Math.max(list.children.length + CHUNK, minLength));
    const fragment = document.createDocumentFragment();
    for (let i = list.children.length; i < end; i++) fragment.append(option(i));
    list.append(fragment);
  }

  function option(i) {
    const number = numbers[i];
    const { key, label, best } = samples[number];
    const text = label === best ? label : `${label} ≠ ${best}`;
    const element = make("li", { role: "option", tabindex: "-1", "aria-selected": "false", title: key });
    element.setAttribute("aria-label", `${key}, label ${label}${label === best ? "" : `, ranked first: ${best}`}`);
    element.setAttribute("aria-posinset", i + 1);
    element.setAttribute("aria-setsize", numbers.length);
    element.dataset.number = number;
    element.append(make("span", { class: "thumbnail" }), make("span", { class: "caption" }, breakable(text)));
    element.classList.toggle("disagrees", label !== best);
    inView.observe(element);
    return element;
  }

  function select(wanted, focus = false) {
    if (!numbers.length) return;
    list.children[position]?.setAttribute("aria-selected", "false");
    list.children[position]?.setAttribute("tabindex", "-1");
    position = clamp(wanted, 0, numbers.length - 1);
    grow(position + 1 < list.children.length ? 0 : position + CHUNK);
    const element = list.children[position];
    element.setAttribute("aria-selected", "true");
    element.setAttribute("tabindex", "0");
    if (focus) element.focus({ preventScroll: true });
    selected = numbers[position];
    onSelect(selected);
    reveal(element); // at last: the list is as high as the sample
  }

  /** Scroll the list, without scrolling the page, until an option is visible. */
  function reveal({ offsetLeft, offsetTop, offsetWidth, offsetHeight }) {
    const left = clamp(list.scrollLeft, offsetLeft + offsetWidth - list.clientWidth, offsetLeft);
    const top = clamp(list.scrollTop, offsetTop + offsetHeight - list.clientHeight, offsetTop);
    list.scrollTo({ left, top });
  }

  function columns() {
    const first = list.children[0].offsetTop;
    const next = [...list.children].findIndex((element) => element.offsetTop !== first);
    return next < 0 ? 1 : next; // in a single row, up and down act like left and right
  }

  list.addEventListener("click", (event) => {
    const element = event.target.closest("[role=option]");
    if (element) select([...list.children].indexOf(element), true);
  });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !numbers.length) return;
    const row = columns();
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row, PageUp: -5 * row, PageDown: 5 * row };
    if (event.key in steps) {
      const wanted = position + steps[event.key];
      if (Math.abs(steps[event.key]) === 1 || (0 <= wanted && wanted < numbers.length) || event.key.startsWith("Page")) select(wanted, true);
    } else if (event.key === "Home") select(0, true);
    else if (event.key === "End") select(numbers.length - 1, true);
    else return;
    event.preventDefault();
  });

  return {
    show(wanted) {
      inView.disconnect();
      numbers = wanted;
      position = -1;
      list.replaceChildren();
      list.scrollTo(0, 0);
      grow();
      select(Math.max(0, numbers.indexOf(selected)));
    },
    select,
  };
}

/** Return the samples of an index as objects, and the names of its classes. */
function readIndex() {
  const { classes, samples: columns, ...others } = JSON.parse(document.getElementById("index").textContent);
  const samples = columns.key.map((key, i) => ({
    key,
    label: classes[columns.label[i]],
    best: classes[columns.best[i]],
    labelIndex: columns.label[i],
    bestIndex: columns.best[i],
    shown: columns.shown[i], // number of classes that the image shows
    margin: columns.margin[i], // log odds of the label in the image and its parts
    pLabel: columns.p_label[i],
    pBest: columns.p_best[i],
  }));
  return { classes, samples, ...others };
}

/** Select a sample among all samples. The filters may hide it. */
function openSample(gallery, number) {
  document.getElementById("filters").reset();
  setTimeout(() => {
    gallery.select(number, true);
    document.getElementById("samples").scrollIntoView();
  });
}

/** Return a text that may also be wrapped after underscores. */
function breakable(text) {
  return text.replaceAll("_", "_\u200b");
}

/** Create an element with attributes and a text. All strings from the dataset enter the page through this function. */
function make(name, attributes = {}, text = null) {
  const element = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  if (text !== null) element.textContent = text;
  return element;
}

/** Fill the options of the filters, and call `onChange` with the numbers of the samples that pass them. */
function makeFilters(samples, onChange) {
  const form = document.getElementById("filters");
  const fill = (id, all, choices) => {
    const options = choices.map(([value, text]) => make("option", { value }, text));
    document.getElementById(id).replaceChildren(make("option", { value: "" }, all), ...options);
  };
  document.getElementById("fold").open = window.matchMedia("(min-width: 40rem)").matches;
  const names = new Set(samples.flatMap(({ label, best }) => [label, best]));
  fill("class", "all", [...names].sort().map((name) => [name, name]));
  const counts = new Map();
  for (const { shown } of samples) counts.set(shown, (counts.get(shown) ?? 0) + 1);
  const byNumber = [...counts].sort(([a], [b]) => a - b);
  fill("shown", "any", byNumber.map(([number, count]) => [String(number), `${number} (${count} ${count === 1 ? "sample" : "samples"})`]));

  const orders = {
    suspect: (a, b) => samples[a].margin - samples[b].margin,
    shown: (a, b) => samples[b].shown - samples[a].shown,
  };
  const apply = () => {
    const chosen = Object.fromEntries(new FormData(form));
    const text = chosen.text.trim().toLowerCase();
    const passes = ({ key, label, best, shown }) =>
      key.toLowerCase().includes(text) &&
      (!chosen.class || chosen.class === label || chosen.class === best) &&
      (!chosen.agreement || (chosen.agreement === "agree") === (label === best)) &&
      (!chosen.shown || Number(chosen.shown) === shown);
    const passing = [...samples.keys()].filter((number) => passes(samples[number]));
    if (chosen.order) passing.sort(orders[chosen.order]);
    document.getElementById("count").textContent = `${passing.length} of ${samples.length} samples`;
    document.getElementById("gallery").classList.toggle("none", passing.length === 0);
    onChange(passing);
  };
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply)); // the fields change after this event
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
