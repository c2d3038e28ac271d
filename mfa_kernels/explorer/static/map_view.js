/** Where the map is looked at from: its scale and place, and which dot is under a point. */

const LARGEST = 200;

/** The least and the largest of values; of none, 0 and 0. */
function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 0];
}

export class MapView {
  constructor() {
    Object.assign(this, { width: 1, height: 1, zoom: 1, x: 0, y: 0, base: 1, middle: [0, 0], half: [1, 1] });
  }

  /** Fits the view to the points, for which zoom 1 shows all. */
  frame(xs, ys) {
    const [[left, right], [low, high]] = [range(xs), range(ys)];
    this.middle = [(left + right) / 2, (low + high) / 2];
    this.half = [Math.max((right - left) / 2, 1e-6), Math.max((high - low) / 2, 1e-6)];
    this.resize(this.width, this.height);
  }

  resize(width, height) {
    this.width = Math.max(width, 1);
    this.height = Math.max(height, 1);
    const margin = Math.min(28, this.width / 8);
    const before = this.base;
    this.base = Math.min((this.width / 2 - margin) / this.half[0], (this.height / 2 - margin) / this.half[1]);
    // What was in the middle stays there.
    this.x *= this.base / before;
    this.y *= this.base / before;
  }

  get scale() {
    return this.base * this.zoom;
  }

  screenX = (x) => this.width / 2 + (x - this.middle[0]) * this.scale + this.x;

  screenY = (y) => this.height / 2 - (y - this.middle[1]) * this.scale + this.y;

  dataX = (x) => (x - this.width / 2 - this.x) / this.scale + this.middle[0];

  dataY = (y) => (this.height / 2 + this.y - y) / this.scale + this.middle[1];

  /** Zooms by a factor and keeps the point of the window where it is. */
  zoomAt(factor, x = this.width / 2, y = this.height / 2) {
    const zoom = Math.min(LARGEST, Math.max(0.7, this.zoom * factor));
    const real = zoom / this.zoom;
    this.x = (this.x - (x - this.width / 2)) * real + (x - this.width / 2);
    this.y = (this.y - (y - this.height / 2)) * real + (y - this.height / 2);
    this.zoom = zoom;
    this.pan(0, 0);
  }

  /** Moves by pixels; part of the map always stays in sight. */
  pan(dx, dy) {
    const most = [this.half[0] * this.scale, this.half[1] * this.scale];
    this.x = Math.max(-most[0], Math.min(most[0], this.x + dx));
    this.y = Math.max(-most[1], Math.min(most[1], this.y + dy));
  }

  /** Looks at a point of the map. */
  center(x, y, zoom = this.zoom) {
    this.zoom = zoom;
    this.x = -(x - this.middle[0]) * this.scale;
    this.y = (y - this.middle[1]) * this.scale;
  }

  reset() {
    Object.assign(this, { zoom: 1, x: 0, y: 0 });
  }
}

/** Points by cells of a grid, so that what is near the pointer is found without looking at all of them. */
export class Grid {
  constructor(xs, ys) {
    this.xs = xs;
    this.ys = ys;
    const n = xs.length;
    this.side = Math.max(1, Math.ceil(Math.sqrt(n / 3)));
    const ranges = [range(xs), range(ys)];
    this.low = ranges.map(([low]) => low);
    this.cell = ranges.map(([low, high]) => (high - low) / this.side || 1);
    const cells = new Int32Array(n);
    this.starts = new Int32Array(this.side ** 2 + 1);
    for (let i = 0; i < n; i++) {
      cells[i] = this.row(ys[i]) * this.side + this.column(xs[i]);
      this.starts[cells[i] + 1]++;
    }
    for (let c = 0; c < this.side ** 2; c++) this.starts[c + 1] += this.starts[c];
    this.members = new Int32Array(n);
    const next = this.starts.slice();
    for (let i = 0; i < n; i++) this.members[next[cells[i]]++] = i;
  }

  column = (x) => Math.min(this.side - 1, Math.max(0, Math.floor((x - this.low[0]) / this.cell[0])));

  row = (y) => Math.min(this.side - 1, Math.max(0, Math.floor((y - this.low[1]) / this.cell[1])));

  /** The point for which `cost(i, distance)` is least, among those within `radius`; -1 where it is never below 0. */
  nearest(x, y, radius, cost) {
    let [best, least] = [-1, 0];
    for (let row = this.row(y - radius); row <= this.row(y + radius); row++) {
      const from = this.starts[row * this.side + this.column(x - radius)];
      const to = this.starts[row * this.side + this.column(x + radius) + 1];
      for (let m = from; m < to; m++) {
        const i = this.members[m];
        const found = cost(i, Math.hypot(this.xs[i] - x, this.ys[i] - y));
        if (found < least) [best, least] = [i, found];
      }
    }
    return best;
  }
}
