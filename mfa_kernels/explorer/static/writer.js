/** Texts that the model writes: how one streams into its pane, is changed on the way, and stopped. */

import { post, postLines } from "./api.js";
import { fill, tag, throttle } from "./dom.js";
import { fixed, plural } from "./format.js";
import { failure, isAbort, say } from "./states.js";
import { tip } from "./tooltip.js";

const CHANGES = 150;
const PATIENCE = 2000;

/** A place for one text: the prompt in grey, then what is written. */
export class Pane {
  constructor(title, test, hint) {
    this.text = tag("div", {
      class: "written",
      "data-test": test,
      "aria-live": "polite",
      "aria-label": title,
      role: "log",
    });
    this.foot = tag("p", { class: "pane-foot muted" });
    this.node = tag("section", { class: "panel pane" }, tag("h2", {}, title), this.text, this.foot);
    fill(this.text, tag("span", { class: "muted" }, hint));
  }

  start(prompt) {
    fill(this.text, tag("span", { class: "given", dir: "auto" }, prompt));
    this.text.setAttribute("aria-busy", "true");
    this.node.classList.add("writing");
    fill(this.foot, "Writing…");
  }

  add(piece) {
    const last = this.text.lastChild;
    // Growing one text node keeps a long text cheap.
    if (last?.nodeType === Node.TEXT_NODE) last.appendData(piece);
    else this.text.append(piece);
    const rest = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight;
    if (rest < 60) this.text.scrollTop = this.text.scrollHeight;
  }

  mark(text) {
    this.text.append(tip(tag("span", { class: "change" }, text), ["Changed here", text]));
  }

  end(...shown) {
    this.text.removeAttribute("aria-busy");
    this.node.classList.remove("writing");
    fill(this.foot, ...shown);
  }
}

function result({ tokens, seconds, nll }) {
  return [
    plural(tokens, "token"),
    seconds > 0 && `${fixed(tokens / seconds, 1)} tokens/s`,
    Number.isFinite(nll) && `nll ${fixed(nll)} nats a token without steering`,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** One text being written. */
export class Run {
  #controller = new AbortController();
  #id = null;
  #changes = {};
  #isOver = false;

  constructor(pane, signal) {
    this.pane = pane;
    signal.addEventListener("abort", () => this.stop());
    this.send = throttle(() => this.#sendChanges(), CHANGES);
  }

  /** Writes into the pane until the text ends. @returns {Promise<boolean>} whether it came to its end */
  async write(body) {
    this.pane.start(body.prompt);
    try {
      for await (const line of postLines("/api/steer", body, this.#controller.signal)) {
        if (line.error) throw new Error(line.error);
        if (line.run) this.#id = line.run;
        if (line.run && Object.keys(this.#changes).length) this.send();
        if (line.text) this.pane.add(line.text);
        if (line.done) {
          this.pane.end(result(line));
          return !line.stopped;
        }
      }
      this.pane.end("Ended early.");
    } catch (error) {
      this.pane.end(isAbort(error) ? "Stopped." : failure(error));
    } finally {
      this.#isOver = true;
    }
    return false;
  }

  /** Changes the run while it writes; changes in quick succession go together. */
  change(fields) {
    if (this.#isOver) return;
    Object.assign(this.#changes, fields);
    if (this.#id) this.send();
  }

  async #sendChanges() {
    const { note, ...fields } = this.#changes;
    this.#changes = {};
    if (this.#isOver || !note) return;
    try {
      await post(`/api/steer/${this.#id}`, fields);
      if (!this.#isOver) this.pane.mark(note);
    } catch (error) {
      if (!this.#isOver) say(error.message);
    }
  }

  /** Asks the server to end the text; a server that does not is left. */
  stop() {
    if (this.#isOver) return;
    const leave = () => this.#isOver || this.#controller.abort();
    if (!this.#id) return leave();
    post(`/api/steer/${this.#id}/stop`, {}).catch(leave);
    setTimeout(leave, PATIENCE);
  }
}
