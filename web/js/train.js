// The panel on a training node: live loss curve, figures, and the button "Stop and keep".
// Everything also works without it: the same curve is the node's preview, and Cancel keeps the work done so far.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const EVENT = "concept-atelier.train";
const TRAINING_NODES = new Set(["AtelierTrain", "AtelierTrainNullText"]);
const HEIGHT = 190;

const panels = new WeakMap(); // node -> its panel

// An execution id names a node by the subgraph nodes that lead to it: "12" at the top, "3:7" inside subgraph node 3.
function nodeOf(executionId) {
  const graph = app.rootGraph ?? app.graph;
  const path = String(executionId).split(":");
  return path.reduce((node, id) => {
    const inside = node === null ? graph : node?.subgraph;
    return inside?.getNodeById(id) ?? inside?.getNodeById(Number(id)) ?? undefined;
  }, null);
}

function element(tag, style, text = "") {
  const made = document.createElement(tag);
  Object.assign(made.style, style);
  made.textContent = text;
  return made;
}

function duration(seconds) {
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

class Panel {
  constructor() {
    this.executionId = null;
    this.root = element("div", {
      display: "flex",
      flexDirection: "column",
      gap: "4px",
      height: "100%",
      minHeight: `${HEIGHT}px`,
      font: "12px sans-serif",
      overflow: "hidden",
    });
    this.root.className = "concept-atelier-panel";
    this.canvas = element("canvas", { width: "100%", flex: "1 1 0", minHeight: "60px" });
    this.figures = element("div", { whiteSpace: "pre-wrap" }, "The loss curve appears here while it trains.");
    this.stats = element("div", { whiteSpace: "pre-wrap", opacity: "0.75" });
    this.button = element("button", { padding: "4px", cursor: "pointer" }, "Stop and keep");
    this.button.title = "End the training after this step and go on with what was learned so far.";
    this.button.disabled = true;
    this.button.addEventListener("click", () => this.stop());
    this.root.append(this.canvas, this.figures, this.stats, this.button);
  }

  async stop() {
    this.button.disabled = true;
    this.button.textContent = "Stopping after this step ...";
    const request = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ node: this.executionId }),
    };
    await api.fetchApi("/concept-atelier/stop", request).catch(() => this.rest()); // not heard: it can be pressed again
  }

  show({ node, step, total, loss, ema, curve, it_s, eta_s, stats }) {
    const running = step < total;
    if (this.executionId === null) this.button.textContent = "Stop and keep";
    if (this.button.textContent === "Stop and keep") this.button.disabled = !running;
    this.executionId = node;
    const figures = [`step ${step} / ${total}`];
    if (loss !== null) figures.push(`loss ${loss.toFixed(4)}`);
    if (ema !== null) figures.push(`average ${ema.toFixed(4)}`);
    if (it_s !== null) figures.push(it_s >= 1 ? `${it_s.toFixed(1)} steps/s` : `${(1 / it_s).toFixed(1)} s/step`);
    if (eta_s !== null && running) figures.push(`${duration(eta_s)} left`);
    this.figures.textContent = figures.join("   ");
    this.stats.textContent = Object.entries(stats)
      .map(([name, value]) => `${name} ${value === null ? "-" : Number(value.toPrecision(3))}`)
      .join("   ");
    this.draw(curve);
  }

  // The node or the prompt ended: whatever the button was about is over.
  rest() {
    this.executionId = null;
    this.button.disabled = true;
    this.button.textContent = "Stop and keep";
  }

  draw(curve) {
    const scale = globalThis.devicePixelRatio || 1;
    const width = (this.canvas.width = Math.max(1, Math.round(this.canvas.clientWidth * scale)));
    const height = (this.canvas.height = Math.max(1, Math.round(this.canvas.clientHeight * scale)));
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!curve.length) return;
    const values = curve.flatMap(([, loss, ema]) => [loss, ema]);
    const low = Math.min(...values);
    const range = Math.max(...values) - low;
    const first = curve[0][0];
    const steps = curve[curve.length - 1][0] - first;
    const pad = 3 * scale;
    const place = (step, value) => [
      pad + (steps ? (step - first) / steps : 0.5) * (width - 2 * pad),
      height - pad - (range ? (value - low) / range : 0.5) * (height - 2 * pad),
    ];
    for (const [column, colour, thickness] of [
      [1, "#8a949e", 1],
      [2, "#e69f00", 2.5],
    ]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness * scale;
      context.lineCap = "round";
      context.beginPath();
      context.moveTo(...place(curve[0][0], curve[0][column]));
      for (const point of curve) context.lineTo(...place(point[0], point[column]));
      context.stroke();
    }
  }
}

app.registerExtension({
  name: "Concept Atelier.train",

  setup() {
    const live = new Set();
    api.addEventListener(EVENT, ({ detail }) => {
      const panel = panels.get(nodeOf(detail.node));
      if (!panel) return;
      live.add(panel);
      panel.show(detail);
    });
    api.addEventListener("executed", ({ detail }) => panels.get(nodeOf(detail.node))?.rest());
    for (const end of ["execution_success", "execution_interrupted", "execution_error"]) {
      api.addEventListener(end, () => {
        live.forEach((panel) => panel.rest());
        live.clear();
      });
    }
  },

  nodeCreated(node) {
    if (!TRAINING_NODES.has(node.comfyClass)) return;
    const panel = new Panel();
    panels.set(node, panel);
    const options = { serialize: false, getMinHeight: () => HEIGHT }; // not in the prompt,
    node.addDOMWidget("training", "concept-atelier.training", panel.root, options).serialize = false; // nor in the file
  },
});
