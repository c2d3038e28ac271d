/** Pointer, wheel and keys of the map. */

const STEP = 60;
const CLICK = 5;

/**
 * @param {HTMLCanvasElement} canvas
 * @param {object} acts `pan(dx, dy)`, `zoom(factor, x, y)`, `hover(x, y)`, `leave()`, `click(x, y, event)`, `reset()`
 * @param {boolean} compact a small map beside a text leaves the wheel and vertical swipes to the page
 */
export function listen(canvas, acts, compact) {
  const fingers = new Map();
  let moved = 0;
  let spread = 0;
  const at = (event) => {
    const place = canvas.getBoundingClientRect();
    return [event.clientX - place.left, event.clientY - place.top];
  };
  const pinch = () => {
    const [a, b] = [...fingers.values()];
    return { spread: Math.hypot(a[0] - b[0], a[1] - b[1]), middle: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2] };
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button > 1) return;
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, at(event));
    if (fingers.size === 1) moved = 0;
    if (fingers.size === 2) ({ spread } = pinch());
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = at(event);
    const before = fingers.get(event.pointerId);
    if (!before) return acts.hover(...now, event);
    fingers.set(event.pointerId, now);
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    moved += Math.hypot(dx, dy);
    if (fingers.size === 2) {
      moved = Infinity;
      const to = pinch();
      acts.pan(dx / 2, dy / 2);
      acts.zoom(to.spread / (spread || 1), ...to.middle);
      ({ spread } = to);
    } else if (moved > CLICK) {
      canvas.classList.add("dragged");
      acts.pan(dx, dy);
    }
  });
  const up = (event) => {
    if (!fingers.delete(event.pointerId)) return;
    canvas.classList.remove("dragged");
    if (event.type === "pointerup" && moved <= CLICK && !fingers.size) acts.click(...at(event), event);
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => acts.leave());
  canvas.addEventListener("dblclick", (event) => acts.zoom(2, ...at(event)));
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (compact && !event.ctrlKey) return;
      event.preventDefault();
      const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1);
      acts.zoom(Math.exp(-Math.max(-300, Math.min(300, pixels)) * (event.ctrlKey ? 0.01 : 0.0018)), ...at(event));
    },
    { passive: false },
  );
  const keys = {
    ArrowLeft: () => acts.pan(STEP, 0),
    ArrowRight: () => acts.pan(-STEP, 0),
    ArrowUp: () => acts.pan(0, STEP),
    ArrowDown: () => acts.pan(0, -STEP),
    "+": () => acts.zoom(1.4),
    "=": () => acts.zoom(1.4),
    "-": () => acts.zoom(1 / 1.4),
    0: () => acts.reset(),
  };
  canvas.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
}
