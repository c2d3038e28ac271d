/** The map of the regions: one dot each, near where their centroids are near, as large as their share. */

import { tokensOf } from "./atlas.js";
import { hue, resolved } from "./colors.js";
import { button, tag } from "./dom.js";
import { count, percent } from "./format.js";
import { classify } from "./map_classes.js";
import { listen } from "./map_input.js";
import { drawScene, growth, radii } from "./map_scene.js";
import { Grid, MapView } from "./map_view.js";
import { hideTip, showTip } from "./tooltip.js";

const GLIDE = 500;
const NOTHING = { at: -1, neighbors: [], constellation: [] };
const isStill = matchMedia("(prefers-reduced-motion: reduce)");

/** What the map draws around a region, from the server's answer about it. */
export function around({ component, neighbors, constellation }) {
  return { component, neighbors: neighbors.map((one) => one.component), constellation };
}

export class RegionMap {
  /**
   * @param {HTMLElement} place what the map fills
   * @param {object} about the server's facts
   * @param {AbortSignal} signal ends the map
   * @param {{compact?: boolean, onopen: (component: number) => void, onhover?: (component: number) => void}} options
   */
  constructor(place, about, signal, { compact = false, onopen, onhover = () => {} }) {
    Object.assign(this, { about, compact, onopen, onhover, signal, map: null, view: new MapView(), frame: 0 });
    Object.assign(this, {
      hovered: -1,
      marked: [],
      focus: NOTHING,
      focused: null,
      shown: new Set(),
      lit: -1,
      glide: null,
    });
    this.whenSized = null;
    this.mode = about.genres.length ? "genre" : "kind";
    this.canvas = tag("canvas", {
      class: "map-canvas",
      tabindex: "0",
      role: "application",
      "aria-roledescription": "map",
      "aria-label": compact
        ? "Where this region is on the map"
        : "Map of all regions. Arrow keys move, plus and minus zoom.",
      "data-test": "map-canvas",
    });
    place.append(this.canvas, this.#buttons());
    listen(this.canvas, this.#acts(), compact);
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.canvas);
    document.addEventListener("themechange", () => this.recolor(), { signal });
    signal.addEventListener("abort", () => {
      observer.disconnect();
      cancelAnimationFrame(this.frame);
    });
  }

  #buttons() {
    const zoom = (factor) => () => this.#acts().zoom(factor);
    return tag(
      "div",
      { class: "map-buttons" },
      button("+", zoom(1.6), { class: "icon", "aria-label": "Zoom in", title: "Zoom in (+)" }),
      button("−", zoom(1 / 1.6), { class: "icon", "aria-label": "Zoom out", title: "Zoom out (-)" }),
      button("⤢", () => this.#acts().reset(), { class: "icon", "aria-label": "Show all", title: "Show all (0)" }),
    );
  }

  #acts() {
    const seen =
      (act) =>
      (...given) => {
        act(...given);
        this.hover(-1);
        this.redraw();
      };
    return {
      pan: seen((dx, dy) => this.view.pan(dx, dy)),
      zoom: seen((factor, x, y) => this.view.zoomAt(factor, x, y)),
      reset: seen(() => this.view.reset()),
      hover: (x, y, event) => this.hover(this.under(x, y), event),
      leave: () => this.hover(-1),
      click: (x, y) => {
        const i = this.under(x, y);
        if (i >= 0) this.onopen(this.map.components[i]);
      },
    };
  }

  /** Takes a map from the server; where only the layout is new, dots glide to their new places. */
  setMap(map) {
    const same = this.map?.components.length === map.components.length && !isStill.matches && !document.hidden;
    const from = same ? [this.xs, this.ys] : null;
    this.map = map;
    this.places = new Map(map.components.map((component, i) => [component, i]));
    const to = [Float32Array.from(map.x), Float32Array.from(map.y)];
    this.grid = new Grid(...to);
    this.view.frame(...to);
    this.glide = from && { from, to, start: performance.now() };
    [this.xs, this.ys] = from ? from.map((values) => values.slice()) : to;
    this.order = Int32Array.from(map.share.keys()).sort((a, b) => map.share[b] - map.share[a]);
    this.setMode(this.mode);
    this.setFocus(this.focused);
    this.resize();
  }

  setMode(mode) {
    this.mode = mode;
    this.shown = new Set();
    if (!this.map) return;
    Object.assign(this, classify(this.map, mode, this.about.genres));
    this.recolor();
  }

  /** The region that is looked at, with what is drawn around it: {component, neighbors, constellation}, or null. */
  setFocus(focused) {
    this.focused = focused;
    const found = (components) => components.map((k) => this.places.get(k) ?? -1).filter((i) => i >= 0);
    if (!focused || !this.map || !this.places.has(focused.component)) this.focus = NOTHING;
    else {
      const [at] = found([focused.component]);
      const neighbors = found(focused.neighbors ?? []).filter((i) => i !== at);
      const constellation = found(focused.constellation ?? []).filter((i) => i !== at && !neighbors.includes(i));
      this.focus = { at, neighbors, constellation };
    }
    this.redraw();
  }

  /** Looks at a region from near enough to see what is around it. */
  lookAt(component, zoom) {
    const i = this.places?.get(component);
    if (i === undefined) return;
    if (!this.radius) return void (this.whenSized = () => this.lookAt(component, zoom));
    this.view.center(this.map.x[i], this.map.y[i], zoom);
    this.redraw();
  }

  /** Looks at the region in focus from where all its neighbours are in sight. */
  lookAround() {
    const { at, neighbors, constellation } = this.focus;
    if (at < 0) return;
    // A map that is not on the page yet has no size to fit into.
    if (!this.radius) return void (this.whenSized = () => this.lookAround());
    const { x, y } = this.map;
    const reach = Math.max(
      0,
      ...[...neighbors, ...constellation].map((i) => Math.max(Math.abs(x[i] - x[at]), Math.abs(y[i] - y[at]))),
    );
    const room = Math.min(this.view.width, this.view.height) / 2 - 24;
    this.lookAt(this.map.components[at], Math.min(12, Math.max(1, room / (reach * this.view.base || 1))));
  }

  setMarked(components) {
    this.marked = components.map((k) => this.places?.get(k) ?? -1).filter((i) => i >= 0);
    this.redraw();
  }

  setShown(shown) {
    this.shown = shown;
    this.redraw();
  }

  /** Lights up one class for as long as its entry in the legend is pointed at; -1 for none. */
  light(index) {
    this.lit = index;
    this.redraw();
  }

  recolor() {
    if (!this.classes) return;
    const [ground, ink, muted, accent, none, ...classes] = resolved([
      "var(--surface)",
      "var(--ink)",
      "var(--muted)",
      "var(--accent)",
      hue(-1),
      ...this.classes.map((one) => one.color),
    ]);
    this.colors = { ground, ink, muted, accent, none, classes };
    this.redraw();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.view.resize(width, height);
    if (this.map) this.radius = radii(this.map.share, width, height);
    const act = this.whenSized;
    this.whenSized = null;
    act?.();
    this.redraw(true);
  }

  redraw(now = false) {
    if (now) return this.draw();
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (!this.map || !this.radius || !this.colors || this.signal.aborted) return;
    if (this.glide) this.#glideOn();
    const context = this.canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const { shown, lit, classOf } = this;
    const isShown = (i) => (lit >= 0 ? classOf[i] === lit : !shown.size || shown.has(classOf[i]));
    drawScene(context, { ...this, names: this.map.label, isShown, isFiltered: lit >= 0 || shown.size > 0 });
  }

  #glideOn() {
    const { from, to, start } = this.glide;
    const t = Math.min(1, (performance.now() - start) / GLIDE);
    const eased = t * t * (3 - 2 * t);
    for (const [now, a, b] of [
      [this.xs, from[0], to[0]],
      [this.ys, from[1], to[1]],
    ]) {
      for (let i = 0; i < now.length; i++) now[i] = a[i] + (b[i] - a[i]) * eased;
    }
    if (t < 1) this.frame = requestAnimationFrame(() => this.draw());
    else this.glide = null;
  }

  /** The dot under a point of the window, or the nearest within a few pixels; -1 for none. */
  under(x, y) {
    if (!this.map || !this.radius || this.glide) return -1;
    const { view, shown, classOf } = this;
    const grow = growth(view.zoom);
    const reach = (this.radius[this.order[0]] ?? 1) * grow + 4;
    return this.grid.nearest(view.dataX(x), view.dataY(y), reach / view.scale, (i, distance) =>
      shown.size && !shown.has(classOf[i]) ? 0 : distance * view.scale - this.radius[i] * grow - 4,
    );
  }

  hover(i, event) {
    if (event?.pointerType === "touch") return;
    if (i >= 0) showTip(this.#lines(i), event.clientX, event.clientY);
    else if (this.hovered >= 0) hideTip();
    if (i === this.hovered) return;
    this.hovered = i;
    this.canvas.classList.toggle("over", i >= 0);
    this.onhover(i < 0 ? -1 : this.map.components[i]);
    this.redraw();
  }

  /** Points at a region from elsewhere, say from its row in the table; null for none. */
  point(component) {
    this.hovered = component === null ? -1 : (this.places?.get(component) ?? -1);
    this.redraw();
  }

  #lines(i) {
    const { map, about } = this;
    const tokens = tokensOf(map.components[i]);
    return [
      map.label[i],
      `Region ${map.components[i]} · ${percent(map.share[i])} · about ${count(map.share[i] * about.rows)} tokens`,
      [about.genres[map.genre[i]], map.kinds[map.kind[i]]].filter(Boolean).join(" · "),
      tokens.slice(0, 6).join("  "),
    ];
  }
}
