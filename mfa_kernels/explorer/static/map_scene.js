/** Draws the map. What is seen is worked out anew for every frame: dots outside of the window cost a comparison. */

import { clip } from "./format.js";

const LABELS = 46;
const FONT = "12px system-ui, sans-serif";
const STRONG = "600 12.5px system-ui, sans-serif";

/** The radius of a dot in pixels at zoom 1: its area is as its share, and all together fill part of the window. */
export function radii(share, width, height) {
  const total = share.reduce((sum, one) => sum + one, 0) || 1;
  const unit = (0.11 * width * height) / (Math.PI * total);
  const most = Math.min(26, Math.min(width, height) / 14);
  return Float32Array.from(share, (one) => Math.min(most, Math.max(0.9, Math.sqrt(one * unit))));
}

/** Dots grow more slowly than the map, so that those which overlap part as one comes nearer. */
export const growth = (zoom) => Math.min(Math.max(zoom, 0.8) ** 0.4, 4);

function dots(context, scene) {
  const { view, xs, ys, order, radius, classOf, colors, isShown } = scene;
  const { width, height } = view;
  const grow = growth(view.zoom);
  const visible = [];
  const [scale, x0, y0] = [view.scale, view.screenX(0), view.screenY(0)];
  let color = -1;
  for (const pass of scene.isFiltered ? [false, true] : [true]) {
    context.globalAlpha = pass ? 0.82 : 0.13;
    if (!pass) context.fillStyle = colors.none;
    color = -1;
    for (const i of order) {
      if (isShown(i) !== pass) continue;
      const [x, y, r] = [x0 + xs[i] * scale, y0 - ys[i] * scale, radius[i] * grow];
      if (x < -r || y < -r || x > width + r || y > height + r) continue;
      if (pass && color !== classOf[i]) {
        color = classOf[i];
        context.fillStyle = colors.classes[color];
      }
      if (r < 1.7) {
        // A square of the same area: nobody sees the difference, and tens of thousands of them stay smooth.
        context.fillRect(x - r * 0.89, y - r * 0.89, r * 1.78, r * 1.78);
      } else {
        context.beginPath();
        context.arc(x, y, r, 0, 6.2832);
        context.fill();
      }
      if (pass) visible.push(i);
    }
  }
  context.globalAlpha = 1;
  return visible;
}

function ring(context, scene, i, color, width, gap = 1.5) {
  const { view, xs, ys, radius } = scene;
  context.strokeStyle = color;
  context.lineWidth = width;
  context.beginPath();
  context.arc(view.screenX(xs[i]), view.screenY(ys[i]), radius[i] * growth(view.zoom) + gap, 0, 6.2832);
  context.stroke();
}

function lines(context, scene) {
  const { view, xs, ys, focus, colors } = scene;
  if (focus.at < 0) return;
  context.strokeStyle = colors.accent;
  for (const [others, dash, alpha, width] of [
    [focus.constellation, [3, 4], 0.55, 1.1],
    [focus.neighbors, [], 0.85, 1.6],
  ]) {
    context.setLineDash(dash);
    context.globalAlpha = alpha;
    context.lineWidth = width;
    context.beginPath();
    for (const i of others) {
      context.moveTo(view.screenX(xs[focus.at]), view.screenY(ys[focus.at]));
      context.lineTo(view.screenX(xs[i]), view.screenY(ys[i]));
    }
    context.stroke();
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
}

/** Labels from the most relevant dot on; one that would cover another is left out. */
function labels(context, scene, visible) {
  const { view, xs, ys, radius, focus, colors, names } = scene;
  const first = [focus.at, scene.hovered, ...focus.neighbors, ...scene.marked].filter((i) => i >= 0);
  const most = scene.compact ? 0 : Math.min(LABELS, Math.round((view.width * view.height) / 11000));
  const taken = [];
  const special = new Set(first);
  context.textBaseline = "middle";
  context.lineJoin = "round";
  let tried = 0;
  for (const i of [...first, ...visible]) {
    const isSpecial = special.has(i);
    if (!isSpecial && (taken.length >= most || ++tried > 600)) break;
    if (isSpecial && taken.some((box) => box.i === i)) continue;
    const text = clip(names[i], isSpecial ? 34 : 24);
    context.font = isSpecial ? STRONG : FONT;
    const width = context.measureText(text).width;
    const r = radius[i] * growth(view.zoom);
    const [x, y] = [view.screenX(xs[i]), view.screenY(ys[i])];
    if (x < -r || x > view.width + r || y < -r || y > view.height + r) continue;
    const beside = x + r + 4 + width > view.width - 4 ? x - r - 4 - width : x + r + 4;
    const left = Math.max(4, beside);
    const box = { i, left: left - 3, right: left + width + 3, top: y - 9, bottom: y + 9 };
    const covers = (b) => box.left < b.right && box.right > b.left && box.top < b.bottom && box.bottom > b.top;
    if (taken.some(covers) || (scene.compact && i !== focus.at && i !== scene.hovered)) continue;
    taken.push(box);
    context.strokeStyle = colors.ground;
    context.lineWidth = 4;
    context.globalAlpha = 0.9;
    context.strokeText(text, left, y);
    context.globalAlpha = 1;
    context.fillStyle = colors.ink;
    context.fillText(text, left, y);
  }
}

/** Draws everything; the context is scaled to CSS pixels already. */
export function drawScene(context, scene) {
  const { view, focus, colors } = scene;
  context.clearRect(0, 0, view.width, view.height);
  const visible = dots(context, scene);
  lines(context, scene);
  for (const i of focus.constellation) ring(context, scene, i, colors.accent, 1.2);
  for (const i of focus.neighbors) ring(context, scene, i, colors.accent, 1.8);
  for (const i of scene.marked) ring(context, scene, i, colors.ink, 1.4);
  if (focus.at >= 0) ring(context, scene, focus.at, colors.ink, 2.6, 3);
  if (scene.hovered >= 0) ring(context, scene, scene.hovered, colors.ink, 2);
  labels(context, scene, visible);
}
