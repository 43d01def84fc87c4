// The samples that the filters let through, as a list of thumbnails that are drawn when they come into view.

const CHUNK = 60; // thumbnails made at a time

/**
 * Make the list.
 *
 * @param samples of the index.
 * @param draw called with the number of a sample and its element when it first comes into view.
 * @param onSelect called with the number of a sample.
 * @returns {show, select}: show a list of numbers of samples; select one of those shown, by its place.
 */
function makeGallery(samples, draw, onSelect) {
  const list = document.getElementById("gallery");
  let numbers = [];
  let place = -1; // of the selected one, in `numbers`

  const inView = new IntersectionObserver(
    (entries) => {
      // An element that was scrolled in, out and in again has several entries.
      const arrived = new Set(entries.filter(({ isIntersecting }) => isIntersecting).map(({ target }) => target));
      for (const target of arrived) {
        inView.unobserve(target);
        draw(Number(target.dataset.number), target);
        if (target === list.lastElementChild) grow();
      }
    },
    { root: list, rootMargin: "300px" },
  );

  function grow(least = 0) {
    const end = Math.min(numbers.length, Math.max(list.children.length + CHUNK, least));
    const made = document.createDocumentFragment();
    for (let i = list.children.length; i < end; i++) made.append(option(i));
    list.append(made);
  }

  function option(i) {
    const number = numbers[i];
    const { key, label, best } = samples[number];
    const text = label === best ? label : `${label} ≠ ${best}`;
    const element = make("li", { role: "option", tabindex: "-1", "aria-selected": "false", title: key });
    element.setAttribute("aria-label", `${key}, label ${label}${label === best ? "" : `, map says ${best}`}`);
    element.setAttribute("aria-posinset", i + 1);
    element.setAttribute("aria-setsize", numbers.length);
    element.dataset.number = number;
    element.append(make("span", { class: "thumbnail" }), make("span", { class: "caption" }, text));
    element.classList.toggle("disagrees", label !== best);
    inView.observe(element);
    return element;
  }

  function select(wanted, focus = false) {
    if (!numbers.length) return;
    list.children[place]?.setAttribute("aria-selected", "false");
    list.children[place]?.setAttribute("tabindex", "-1");
    place = clamp(wanted, 0, numbers.length - 1);
    grow(place + 1 < list.children.length ? 0 : place + CHUNK);
    const element = list.children[place];
    element.setAttribute("aria-selected", "true");
    element.setAttribute("tabindex", "0");
    if (focus) element.focus({ preventScroll: true });
    reveal(element);
    onSelect(numbers[place]);
  }

  /** Scroll the list, and not the page, until an option is in view. */
  function reveal({ offsetLeft, offsetTop, offsetWidth, offsetHeight }) {
    const left = clamp(list.scrollLeft, offsetLeft + offsetWidth - list.clientWidth, offsetLeft);
    const top = clamp(list.scrollTop, offsetTop + offsetHeight - list.clientHeight, offsetTop);
    list.scrollTo({ left, top });
  }

  function columns() {
    const first = list.children[0].offsetTop;
    const next = [...list.children].findIndex((element) => element.offsetTop !== first);
    return next < 0 ? 1 : next; // in a single row, up and down are left and right
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
      const wanted = place + steps[event.key];
      if (Math.abs(steps[event.key]) === 1 || (0 <= wanted && wanted < numbers.length) || event.key.startsWith("Page")) select(wanted, true);
    } else if (event.key === "Home") select(0, true);
    else if (event.key === "End") select(numbers.length - 1, true);
    else return;
    event.preventDefault();
  });

  return {
    show(wanted) {
      inView.disconnect();
      const selected = numbers[place];
      numbers = wanted;
      place = -1;
      list.replaceChildren();
      list.scrollTo(0, 0);
      grow();
      select(Math.max(0, numbers.indexOf(selected)));
    },
    select,
  };
}

/** Return an element with attributes and a text: texts of the dataset get into the page in no other way. */
function make(name, attributes = {}, text = null) {
  const element = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  if (text !== null) element.textContent = text;
  return element;
}

/** Fill the choices of the filters, and call `onChange` with the numbers of the samples that they let through. */
function makeFilters(samples, onChange) {
  const form = document.getElementById("filters");
  const fill = (id, all, choices) => {
    const options = choices.map(([value, text]) => make("option", { value }, text));
    document.getElementById(id).replaceChildren(make("option", { value: "" }, all), ...options);
  };
  const names = new Set(samples.flatMap(({ label, best }) => [label, best]));
  fill("class", "all", [...names].sort().map((name) => [name, name]));
  const counts = new Map();
  for (const { confident } of samples) counts.set(confident, (counts.get(confident) ?? 0) + 1);
  const byNumber = [...counts].sort(([a], [b]) => a - b);
  fill("confident", "any", byNumber.map(([number, count]) => [String(number), `${number} (${count} samples)`]));

  const orders = {
    doubt: (a, b) => samples[b].doubt - samples[a].doubt,
    confident: (a, b) => samples[b].confident - samples[a].confident,
  };
  const apply = () => {
    const chosen = Object.fromEntries(new FormData(form));
    const text = chosen.text.trim().toLowerCase();
    const lets = ({ key, label, best, confident }) =>
      key.toLowerCase().includes(text) &&
      (!chosen.class || chosen.class === label || chosen.class === best) &&
      (!chosen.agreement || (chosen.agreement === "agree") === (label === best)) &&
      (!chosen.confident || Number(chosen.confident) === confident);
    const found = [...samples.keys()].filter((number) => lets(samples[number]));
    if (chosen.order) found.sort(orders[chosen.order]);
    document.getElementById("count").textContent = `${found.length} of ${samples.length} samples`;
    onChange(found);
  };
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply)); // the fields change after this event
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
