// Evaluates the formulas of the Python package (FORMULAS, written out from the same text) and draws them.

class Values {
  constructor(inputs, groups) {
    this.inputs = inputs;
    this.groups = groups;
    this.memo = new Map();
  }

  value(name, group) {
    if (group !== undefined && name in this.groups[group]) return this.groups[group][name];
    if (name in this.inputs) return this.inputs[name];
    const formula = FORMULAS[name];
    if (!formula) throw new Error(name + ": neither a number nor a formula");
    if (!formula.layer) group = undefined;
    else if (group === undefined) group = 0;
    const key = name + "|" + group;
    if (!this.memo.has(key)) this.memo.set(key, this.run(formula.f, group));
    return this.memo.get(key);
  }

  run(f, group) {
    const inside = (index) => (name) => this.value(name, index);
    const total = (part) => this.groups.reduce((sum, _, index) => sum + part(inside(index)), 0);
    const main = (part) => part(inside(0));
    const crossing = (variable, first, second) => this.crossing(variable, first, second);
    return f(inside(group), total, main, crossing);
  }

  // The same doubling and bisection as mla.plan.formulas.
  crossing(variable, first, second) {
    const lead = (at) => {
      const there = new Values({ ...this.inputs, [variable]: at }, this.groups);
      return Math.sign(there.value(first) - there.value(second));
    };
    const start = lead(1);
    for (let step = 1; step <= DATA.lastDoubling; step++) {
      if (lead(2 ** step) !== start) {
        let low = 2 ** (step - 1), high = 2 ** step;
        for (let i = 0; i < DATA.steps; i++) {
          const middle = (low + high) / 2;
          if (lead(middle) === start) low = middle;
          else high = middle;
        }
        return high;
      }
    }
    return Infinity;
  }
}

// --- words: as mla.plan.words ---
const three = (x) => x === 0 ? "0" : x.toFixed(Math.max(0, 2 - Math.floor(Math.log10(Math.abs(x)))));
const scaled = (x, base, units, gap, whole) => {
  let power = 0;
  while (Math.abs(x) >= base && power < units.length - 1) { x /= base; power++; }
  return (power || !whole ? three(x) : x.toFixed(0)) + gap + units[power];
};
const byteWords = (x) => Number.isFinite(x) ? scaled(x, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], " ", true) : "never";
const countWords = (x, unit = "") => {
  if (!Number.isFinite(x)) return "never";
  if (Math.abs(x) < 10000 && x === Math.round(x)) return (x.toFixed(0) + " " + unit).trimEnd();
  return (scaled(x, 1000, ["", "k", "M", "G", "T", "P", "E"], " ") + unit).trimEnd();
};
const timeWords = (x) => {
  if (!Number.isFinite(x)) return "never";
  for (const [size, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]]) {
    if (x >= size) return three(x / size) + " " + unit;
  }
  return three(x * 1e9) + " ns";
};
const plainWords = (x) => !Number.isFinite(x) ? "never"
  : x === Math.round(x) ? x.toLocaleString("en-US") : Number(x.toPrecision(6)).toString();
const wholeWords = (x) => Number.isFinite(x) ? Math.ceil(x).toLocaleString("en-US") : "never";
const wordsFor = (x, unit) => unit === "B" ? byteWords(x) : unit === "s" ? timeWords(x)
  : unit === "times" ? x.toFixed(1) + " times"
  : unit === "share" ? (100 * x).toFixed(1) + " %" : plainWords(x);

// --- state ---
const $ = (id) => document.getElementById(id);
const SIDE = ["mha", "gqa", "mqa", "mla"], ALL = [...SIDE, "expanded"];
const colour = (column) => `var(--${column})`;
const cacheOf = (column) => column === "expanded" ? "mla" : column;
const tokens = (exponent) => Math.round(2 ** exponent);

// What the page was written for, or what its address asks.
function asked(name, otherwise) {
  const number = Math.round(Number(new URLSearchParams(location.hash.slice(1)).get(name)));
  return number >= 1 && number <= 1e12 ? number : otherwise;
}

function startControls() {
  // Sliders reach as far as the question, however far that is.
  const context = Math.log2(asked("context", DATA.inputs.t)), batch = Math.log2(asked("batch", DATA.inputs.b));
  $("context").min = Math.min(7, Math.floor(context));
  $("context").max = Math.max(20, Math.ceil(context));
  $("context").value = context;
  $("batch").max = Math.max(12, Math.ceil(batch));
  $("batch").value = batch;
  const own = DATA.groups[0].r, rank = asked("rank", own);
  $("rank").min = $("rank").step = own % 16 || rank % 16 ? 1 : 16;
  $("rank").max = Math.max(2 * own, 64, rank);
  $("rank").value = rank;
  DATA.machines.forEach((machine, index) => $("hardware").add(new Option(machine.name, index)));
  const wanted = new URLSearchParams(location.hash.slice(1)).get("hardware");
  const found = DATA.machines.findIndex((machine) => machine.name === wanted);
  $("hardware").value = found >= 0 ? found : 0;
  for (const id of ["context", "batch", "rank", "hardware"]) $(id).addEventListener("input", update);
}

// A slider stands on whole and half powers of two; the asked number stays exact until it is moved.
const exact = (id, start) => $(id).dataset.moved ? tokens(Number($(id).value)) : asked(id, start);

function current() {
  const machine = DATA.machines[Number($("hardware").value)];
  const rank = Number($("rank").value), scale = rank / DATA.groups[0].r;
  const inputs = {
    ...DATA.inputs, t: exact("context", DATA.inputs.t), b: exact("batch", DATA.inputs.b),
    memory: machine.memory, bandwidth: machine.bandwidth,
    peak_weights: machine.peak_weights, peak_attention: machine.peak_attention,
  };
  // A converted model's rotary key depends on the rank that is asked for, as with --rank.
  const keys = DATA.rotaryKeys.filter(([from]) => from <= rank), key = keys.length ? keys[keys.length - 1][1] : undefined;
  // Groups with another rank keep their proportion to the main one.
  const groups = DATA.groups.map((group) => scale === 1 ? group
    : { ...group, r: Math.round(group.r * scale), p: key ?? group.p });
  return { values: new Values(inputs, groups), inputs, machine, rank };
}

// --- drawing ---
const RIGHT = 18, TOP = 10, BOTTOM = 44;
const narrow = matchMedia("(max-width: 40rem)");
let WIDTH, HEIGHT, LEFT;

// Drawings are scaled to the width of the page: on a phone fewer units, so that their text stays readable.
function measure() {
  [WIDTH, HEIGHT, LEFT] = narrow.matches ? [320, 300, 76] : [480, 320, 88];
}

const svg = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

function frame(node, x, y, labelX, labelY, wordX, wordY, base) {
  node.replaceChildren();
  node.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const logOf = (v) => Math.log(v) / Math.log(base);
  const toX = (v) => LEFT + (Math.log(v / x[0]) / Math.log(x[1] / x[0])) * (WIDTH - LEFT - RIGHT);
  const toY = (v) => HEIGHT - BOTTOM - (Math.log(v / y[0]) / Math.log(y[1] / y[0])) * (HEIGHT - TOP - BOTTOM);
  const ticks = ([low, high], step) => {
    const span = Math.ceil(logOf(high)) - Math.floor(logOf(low)), every = Math.max(1, Math.ceil(span / step));
    const list = [];
    for (let e = Math.ceil(logOf(low) - 1e-9); e <= logOf(high) + 1e-9; e += every) list.push(base ** e);
    return list;
  };
  for (const at of ticks(x, 5)) {
    node.append(svg("line", { class: "grid", x1: toX(at), x2: toX(at), y1: TOP, y2: HEIGHT - BOTTOM }));
    node.append(svg("text", { x: toX(at), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, wordX(at)));
  }
  for (const at of ticks(y, 6)) {
    node.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(at), y2: toY(at) }));
    node.append(svg("text", { x: LEFT - 6, y: toY(at) + 4, "text-anchor": "end" }, wordY(at)));
  }
  node.append(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, labelX));
  node.append(svg("text", { x: LEFT + 6, y: TOP + 12 }, labelY));
  return { toX, toY };
}

const shortTokens = (x) => x >= 2 ** 20 ? x / 2 ** 20 + "M" : x >= 1024 ? x / 1024 + "k" : String(x);

function drawCache(values, inputs) {
  const [first, last] = [Number($("context").min), Number($("context").max)], points = [];
  for (let e = first; e <= last; e += 0.5) points.push(2 ** e);
  const at = points.map((t) => new Values({ ...inputs, t }, values.groups));
  const bytes = (column) => at.map((there) => there.value("cache_device_" + column));
  const curves = SIDE.map((column) => [column, bytes(column)]);
  const every = curves.flatMap(([, list]) => list).filter((v) => v > 0);
  const y = [Math.min(...every) / 2, Math.max(...every) * 2];
  const free = inputs.memory - values.value("weights_device_" + DATA.own);
  const { toX, toY } = frame($("cache"), [2 ** first, 2 ** last], y, "tokens of context", "bytes", shortTokens, (x) => byteWords(x).replace(/\.0+ /, " "), 4);
  $("cache").append(svg("line", { class: "here", x1: toX(inputs.t), x2: toX(inputs.t), y1: TOP, y2: HEIGHT - BOTTOM }));
  if (free > y[0] && free < y[1]) {
    $("cache").append(svg("line", { class: "here", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(free), y2: toY(free) }));
    // Near the top it would lie on the axis's name: there it stands below its line.
    const shift = toY(free) < TOP + 32 ? 16 : -5;
    $("cache").append(svg("text", { x: LEFT + 6, y: toY(free) + shift }, byteWords(free) + " free"));
  }
  for (const [column, list] of curves) {
    const path = list.map((v, i) => `${toX(points[i]).toFixed(1)},${toY(v).toFixed(1)}`).join(" ");
    $("cache").append(svg("polyline", { class: "curve " + column, points: path, style: `stroke:${colour(column)}` }));
    $("cache").append(svg("circle", {
      r: 4, cx: toX(inputs.t), cy: toY(values.value("cache_device_" + column)), style: `fill:${colour(column)}`,
    }));
  }
}

function drawRoofline(values, inputs) {
  const ridge = values.value("ridge"), intensities = ALL.map((c) => values.value("intensity_" + c));
  const x = [Math.min(0.5, ...intensities) / 1.5, Math.max(ridge, ...intensities) * 4];
  const peak = inputs.peak_attention, y = [x[0] * inputs.bandwidth, peak * 3];
  const words = (v) => countWords(v, "op/s").replace(/\.0+ /, " "), short = (v) => v < 1 ? v.toFixed(1) : countWords(Math.round(v));
  const { toX, toY } = frame($("roofline"), x, y, "operations per byte of cache", "operations per second", short, words, 10);
  const corner = [[x[0], y[0]], [ridge, peak], [x[1], peak]];
  $("roofline").append(svg("polyline", { class: "roof", points: corner.map(([a, b]) => `${toX(a)},${toY(b)}`).join(" ") }));
  ALL.forEach((column, index) => {
    const cx = toX(intensities[index]), cy = toY(values.value("attainable_" + column));
    $("roofline").append(svg("circle", { r: 5, cx, cy, style: `fill:${colour(column)}` }));
  });
  // Points crowd at the corner: their names and numbers stand above the drawing, where they cannot collide.
  $("points").replaceChildren(...ALL.map((column, index) => key(column, " " + intensities[index].toFixed(1))));
}

const element = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
};

function key(column, more = "") {
  const entry = element("span", DATA.titles[column] + more), mark = element("i");
  mark.style.background = colour(column);
  entry.prepend(mark);
  return entry;
}

function drawTimes(values) {
  const steps = ALL.map((column) => values.value("step_time_" + column));
  const longest = Math.max(...steps);
  $("times").replaceChildren(...ALL.map((column, index) => {
    const bar = element("div", undefined, "bar"), head = element("div", DATA.titles[column]);
    const parts = ["weights", "attention"].map((part) => {
      const time = values.value(`${part}_time_${column}`);
      const piece = element("i", undefined, part);
      piece.style.cssText = `width:${(100 * time) / longest}%;background:${colour(column)}`;
      const bound = values.value(`${part}_memory_time_${column}`) >= values.value(`${part}_arithmetic_time_${column}`);
      return [piece, `${part} ${timeWords(time)} (${bound ? "memory" : "arithmetic"})`];
    });
    head.append(element("span", timeWords(steps[index])));
    const track = element("div", undefined, "track");
    track.append(...parts.map(([piece]) => piece));
    bar.append(head, track, element("div", parts.map(([, words]) => words).join(" · "), "soft"));
    return bar;
  }));
}

function drawTable(values, inputs) {
  const rows = [
    ["numbers per token and layer", "numbers", plainWords], ["bytes per token, all layers", "token_bytes", byteWords],
    ["cache of the batch", "cache_bytes", byteWords],
    ["weights" + (inputs.devices > 1 ? ", on each device" : ""), "weights_device", byteWords],
    ["sequences that fit beside them", "sequences", plainWords],
    ["attention, op per token", "attention_ops", (x) => countWords(x / inputs.s, "op")],
    ["cache moved per step", "cache_moved", byteWords], ["op per byte of cache", "intensity", (x) => x.toFixed(1)],
    ["whole model, op per token", "model_ops", (x) => countWords(x / inputs.s, "op")],
    ["whole model, bytes moved per token", "moved_per_token", byteWords],
    ["step at the roofline", "step_time", timeWords], ["tokens per second, whole batch", "tokens_per_second", (x) => countWords(x)],
  ];
  const head = element("tr");
  head.append(element("th"), ...ALL.map((column) => {
    const cell = element("th", DATA.titles[column]);
    cell.style.color = colour(column);
    return cell;
  }));
  const body = rows.map(([label, name, show]) => {
    const row = element("tr");
    row.append(element("td", label), ...ALL.map((column) => {
      const own = `${name}_${column}` in FORMULAS ? column : cacheOf(column);
      return element("td", show(values.value(`${name}_${own}`)));
    }));
    return row;
  });
  $("table").replaceChildren(head, ...body);
  const turns = ["mha", "gqa", "mqa", "expanded"].map((column) => {
    const t = wholeWords(values.value("context_mla_" + column)), b = wholeWords(values.value("batch_mla_" + column));
    return `${DATA.titles[column]}: context ${t}, batch ${b}`;
  });
  const many = values.value("queries_crossing");
  $("crossings").textContent = "Where a step with MLA absorbed and another first take equally long: " + turns.join("; ")
    + (Number.isFinite(many) ? `. Expanded takes fewer operations from ${wholeWords(many)} query tokens on.` : ".");
}

function drawCards(values, inputs) {
  const saved = values.value("cache_bytes_mha") / values.value("cache_bytes_mla");
  const cards = [
    [byteWords(values.value("cache_bytes_mla")), "cache as MLA"],
    [byteWords(values.value("cache_bytes_mha")), "cache as MHA, " + saved.toFixed(1) + " times as much"],
    [timeWords(values.value("step_time_mla")), "step at the roofline, MLA absorbed"],
    [plainWords(values.value("sequences_mla")), "sequences of this length fit (MHA: " + plainWords(values.value("sequences_mha")) + ")"],
  ];
  $("cards").replaceChildren(...cards.map(([big, small]) => {
    const card = element("div", undefined, "card");
    card.append(element("b", big), element("span", small, "soft"));
    return card;
  }));
}

function drawFormulas(values) {
  if (!$("formulas").open) return;
  $("formulas").querySelectorAll(".formula").forEach((node) => node.remove());
  for (const [name, formula] of Object.entries(DATA.explained)) {
    const node = element("div", undefined, "formula");
    const result = values.value(name);
    node.append(element("b", name), ` = ${formula.text} = ${plainWords(result)} ${formula.unit}`, element("br"));
    node.append(element("span", `${formula.meaning} [${formula.source}]`, "soft"));
    $("formulas").append(node);
  }
}

function update(event) {
  if (event && event.target) event.target.dataset.moved = "yes";
  measure();
  const { values, inputs, machine, rank } = current();
  $("context-out").textContent = inputs.t.toLocaleString("en-US");
  $("batch-out").textContent = inputs.b.toLocaleString("en-US");
  $("rank-out").textContent = rank;
  $("each-device").textContent = inputs.devices > 1 ? ", on each device" : "";
  $("setting").textContent = `${DATA.setting} ${machine.name}: ${byteWords(machine.memory)}, `
    + `${countWords(machine.bandwidth, "B/s")}, ${countWords(machine.peak_attention, "op/s")}.`;
  document.querySelectorAll("[data-v]").forEach((node) => {
    node.textContent = wordsFor(values.value(node.dataset.v, 0), node.dataset.unit);
  });
  drawCards(values, inputs);
  drawCache(values, inputs);
  drawRoofline(values, inputs);
  drawTimes(values);
  drawTable(values, inputs);
  drawFormulas(values);
  const figures = Object.fromEntries(Object.keys(FORMULAS).map((name) => [name, values.value(name)]));
  $("figures").textContent = JSON.stringify(figures);
  $("footer").textContent = `Machine: ${machine.source}. Model: ${DATA.source}. Written by mla ${DATA.version}; `
    + "the formulas are those of the Python package.";
}

startControls();
$("legend").append(...SIDE.map((column) => key(column)));
$("notes").append(...DATA.notes.map((note) => element("li", note)));
$("formulas").addEventListener("toggle", () => drawFormulas(current().values));
narrow.addEventListener("change", () => update());
window.addEventListener("hashchange", () => location.reload());
update();
