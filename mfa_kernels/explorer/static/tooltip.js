/** One tooltip for the page: what the pointer is over or the keyboard has focused says what it is. */

import { fill, tag } from "./dom.js";

const tips = new WeakMap();
const box = tag("div", { class: "tooltip", role: "tooltip", id: "tooltip", hidden: true });
let owner = null;
let last = {};

/** Gives a node a tip: lines of text, the first in bold, or a function that makes them when they are needed. */
export function tip(node, lines) {
  tips.set(node, lines);
  return node;
}

/** Shows lines near a point of the window, inside of it. */
export function showTip(lines, x, y) {
  fill(
    box,
    lines.filter(Boolean).map((line, i) => tag("div", { class: i ? null : "tooltip-first", dir: "auto" }, line)),
  );
  box.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = box;
  const below = y + 18;
  box.style.left = `${Math.max(6, Math.min(x + 12, innerWidth - width - 6))}px`;
  box.style.top = `${Math.max(6, below + height > innerHeight - 6 ? y - height - 12 : below)}px`;
}

export function hideTip() {
  box.hidden = true;
  owner?.removeAttribute("aria-describedby");
  owner = null;
}

function ownerOf(target) {
  for (let node = target; node instanceof Element; node = node.parentElement) if (tips.has(node)) return node;
  return null;
}

function show(node, x, y) {
  if (node === owner) return;
  hideTip();
  if (!node) return;
  const lines = tips.get(node);
  showTip(typeof lines === "function" ? lines() : lines, x, y);
  node.setAttribute("aria-describedby", box.id);
  owner = node;
}

export function startTooltips() {
  document.body.append(box);
  document.addEventListener("pointerover", (event) => {
    // A finger has no hover: its tap opens what it touches.
    if (event.pointerType === "touch") return;
    // Nor does a pointer that rests where something new has come under it.
    const rests = last.x === event.clientX && last.y === event.clientY;
    last = { x: event.clientX, y: event.clientY };
    if (rests) return;
    const node = ownerOf(event.target);
    if (node || owner) show(node, event.clientX, event.clientY);
  });
  document.addEventListener("pointermove", (event) => (last = { x: event.clientX, y: event.clientY }), {
    passive: true,
  });
  document.addEventListener("focusin", (event) => {
    const node = event.target.matches(":focus-visible") ? ownerOf(event.target) : null;
    const place = node?.getBoundingClientRect();
    if (node) show(node, place.left - 6, place.bottom - 12);
  });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}
