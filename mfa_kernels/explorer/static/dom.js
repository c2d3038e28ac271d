/** Elements made by script. Strings become text nodes and never markup, since all that the server sends is hostile. */

const SVG = "http://www.w3.org/2000/svg";

function dress(node, attributes) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, to] of Object.entries(value)) node.style.setProperty(name, to);
    else if (key === "value") node.value = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
}

const kept = (children) =>
  children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/**
 * Makes an element. `on...` attributes are listeners, `style` is an object of properties; null, undefined and false
 * leave an attribute or a child out.
 */
export function tag(name, attributes, ...children) {
  const node = document.createElement(name);
  node.append(...kept(children));
  dress(node, attributes);
  return node;
}

/** The same for SVG. */
export function svg(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  dress(node, attributes);
  node.append(...kept(children));
  return node;
}

/** Puts children in place of what a node has. */
export function fill(node, ...children) {
  node.replaceChildren(...kept(children));
  return node;
}

export function button(text, onclick, attributes) {
  return tag("button", { type: "button", ...attributes, onclick }, text);
}

/** One of several choices; `choices` are pairs of a value and its name. */
export function select(name, choices, value, onchange, attributes) {
  const options = choices.map(([of, text]) =>
    tag("option", { value: of, selected: String(of) === String(value) }, text),
  );
  const node = tag("select", { ...attributes, onchange: () => onchange(node.value) }, options);
  return tag("label", { class: "field" }, tag("span", { class: "field-name" }, name), node);
}

/** Calls `act` once no call has come for `wait` milliseconds. */
export function debounce(act, wait) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...given), wait);
  };
}

/** Calls `act` at most every `wait` milliseconds; the last call always gets through. */
export function throttle(act, wait) {
  let timer = 0;
  let waiting = null;
  const go = () => {
    const given = waiting;
    waiting = null;
    timer = given ? setTimeout(go, wait) : 0;
    if (given) act(...given);
  };
  const call = (...given) => {
    waiting = given;
    if (!timer) go();
  };
  return call;
}
