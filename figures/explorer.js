// The report's instrument. The page holds plotly and the data, packed: nothing is loaded from elsewhere.
// State is what the controls say; every change redraws from it.
"use strict";

const INACTIVE = ["dormant", "immaterial"];
const MEASURES = { margin: "margin, nats", asr: "ASR", clean_accuracy: "clean accuracy" };
const SMALL = matchMedia("(max-width: 42rem)").matches;
const byId = (id) => document.getElementById(id);

async function unpacked(id) {
  const letters = atob(byId(id).textContent.trim());
  const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function start() {
  const library = document.createElement("script");
  library.textContent = await unpacked("plotly");
  document.head.append(library);
  const shown = JSON.parse(await unpacked("data"));
  fillControls(shown);
  byId("explorer").hidden = false;
  const redraw = () => draw(shown);
  for (const control of document.querySelectorAll("#explorer select, #explorer input"))
    control.addEventListener("input", redraw);
  for (const button of document.querySelectorAll("#explorer button[data-picture]"))
    button.addEventListener("click", () => savePicture(button.dataset.picture));
  await redraw();
  byId("dots").on("plotly_click", (event) => {
    const name = event.points[0].customdata;
    if (name !== undefined) pin(shown, name);
  });
  byId("unpin").addEventListener("click", () => pin(shown, ""));
  byId("explorer").dataset.ready = "yes";
}

// ---- Controls.

const option = (value, label) => new Option(label, value);

function box(group, value, label, checked, colour) {
  const made = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "checkbox", name: group, value, checked });
  made.append(input);
  if (colour) {
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = colour;
    made.append(swatch);
  }
  made.append(label);
  return made;
}

function fillControls(shown) {
  const seeds = [...new Set(shown.components.seed)];
  byId("seed").append(...seeds.map((seed) => option(seed, `seed ${seed}`)), option("", "all seeds"));
  byId("height").append(
    ...shown.outlooks.map(({ name, label }) => option(name, `activity ${label}`)),
    option("size", "diff norm"),
    ...(shown.retention.length ? [option("left", "retention, at the moment below")] : []),
  );
  byId("kinds").append(...shown.kinds.map(({ name, label }) => box("kind", name, label, true)));
  const layers = [...new Set(shown.components.layer)].sort((a, b) => (a ?? 1e9) - (b ?? 1e9));
  byId("layers").append(
    ...layers.map((layer) => box("layer", layer ?? "", layer ?? "none", true)),
  );
  byId("classes").append(
    ...shown.classes.map(({ name, label, colour }) => box("class", name, label, true, colour)),
  );
  const looked = shown.arms.filter(({ key }) => shown.retention.some(({ arm }) => arm === key));
  byId("arm").append(...looked.map(({ key, name }) => option(key, name)));
  const decaying = looked.find(({ decays, partly }) => decays && !partly) ?? looked[0];
  if (decaying) byId("arm").value = decaying.key;
  const looks = shown.retention.map(({ step }) => step.length - 1);
  byId("moment").max = Math.max(0, ...looks);
  byId("moment").value = byId("moment").max; // the end
  const exponent = Math.log10(shown.floors.output);
  Object.assign(byId("tolerance"), { min: -8, max: 1, step: 0.05 });
  byId("tolerance").value = exponent;
  // what is between two steps of the slider is put back by asking for the stated tolerance
  byId("tolerance").dataset.stated = byId("tolerance").value;
  byId("measure").append(...Object.entries(MEASURES).map(([name, label]) => option(name, label)));
  byId("starts").append(
    ...shown.starts.map(({ name }, place) => box("start", name, name, place === 0)),
  );
  const curved = shown.arms.filter(({ key }) => shown.behaviour.some(({ arm }) => arm === key));
  byId("arms").append(
    ...curved.map(({ key, name, colour }) => box("arm", key, name, true, colour)),
  );
  const names = [...new Set(shown.components.name)].sort();
  byId("names").append(...names.map((name) => option(name, "")));
}

const checked = (group) =>
  new Set([...document.querySelectorAll(`input[name="${group}"]:checked`)].map(({ value }) => value));

function tolerance(shown) {
  const slider = byId("tolerance");
  return slider.value === slider.dataset.stated ? shown.floors.output : 10 ** slider.value;
}

// ---- What follows from them.

// As analysis/activity.py has it: the output's line moves, the floors of what happens within do not.
function classOf({ clean, least, local, gradient }, i, line, floors) {
  if (clean[i] <= line)
    return local[i] <= floors.local && gradient[i] <= floors.gradient ? "dormant" : "immaterial";
  return least && least[i] > line ? "always_active" : "sometimes_active";
}

function chosen(shown) {
  const seed = byId("seed").value, kinds = checked("kind"), layers = checked("layer");
  const line = tolerance(shown), of = shown.components, rows = [];
  for (let i = 0; i < of.name.length; i++)
    if (
      (seed === "" || of.seed[i] === Number(seed)) &&
      kinds.has(of.kind[i]) &&
      layers.has(String(of.layer[i] ?? ""))
    )
      rows.push({ i, activity: classOf(of, i, line, shown.floors) });
  return rows;
}

function moment(shown) {
  const course = shown.retention.find(({ arm }) => arm === byId("arm").value);
  if (!course) return null;
  byId("moment").max = course.step.length - 1;
  const look = Math.min(Number(byId("moment").value), course.step.length - 1);
  return { ...course, look };
}

// ---- Drawing.

async function draw(shown) {
  const rows = chosen(shown), at = moment(shown);
  say(shown, rows, at);
  await Promise.all([drawDots(shown, rows, at), drawCurves(shown, at), drawPinned(shown, at)]);
}

const short = (number) =>
  number === null || number === undefined || Number.isNaN(number)
    ? "–"
    : String(Number(number.toPrecision(3)));

// Squared norm of the diffs of some rows, as one vector.
const squares = (of, rows) => rows.reduce((sum, { i }) => sum + of.size[i] ** 2, 0);

function say(shown, rows, at) {
  const line = tolerance(shown), of = shown.components;
  byId("tolerance-said").textContent = `${short(line)}\u00a0nats`;
  byId("tolerance").setAttribute("aria-valuetext", byId("tolerance-said").textContent);
  const whole = squares(of, rows);
  const together = { label: "inactive, in all", names: INACTIVE };
  const listed = [...shown.classes.map(({ name, label }) => ({ label, names: [name] })), together];
  byId("shares").replaceChildren(
    ...listed.map(({ label, names }) => {
      const inside = rows.filter(({ activity }) => names.includes(activity));
      const norm = squares(of, inside);
      const made = row(label, [inside.length, inside.length / rows.length, norm / whole]);
      made.insertCell().append(...largest(shown, inside));
      return made;
    }),
  );
  if (!at) return;
  const { exposure, step, look, left } = at;
  const place = `step ${step[look]}, exposure ${short(exposure[look])}`;
  const known = rows.filter(({ i }) => left[look][i] !== null);
  const norm = squares(of, known);
  const kept = known.reduce((sum, { i }) => sum + (left[look][i] / 1000) * of.size[i] ** 2, 0);
  byId("moment-said").textContent =
    `${place}: ${short(kept / norm)} of the diffs shown is left, by the null law ` +
    `${short(at.null[look])}`;
  byId("moment").setAttribute("aria-valuetext", place);
}

// The largest diff, as a button that pins it.
function largest(shown, rows) {
  if (!rows.length) return ["–"];
  const of = shown.components;
  const { i } = rows.reduce((most, each) => (of.size[each.i] > of.size[most.i] ? each : most));
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "name", textContent: of.name[i] });
  button.addEventListener("click", () => pin(shown, `${of.name[i]} ${of.seed[i]}`));
  return [button];
}

function row(label, numbers) {
  const made = document.createElement("tr"), head = document.createElement("th");
  head.scope = "row";
  head.textContent = label;
  made.append(head);
  for (const number of numbers) {
    const cell = document.createElement("td");
    cell.className = "n";
    cell.textContent = short(number);
    made.append(cell);
  }
  return made;
}

const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const LAYOUT = () => ({
  margin: { l: 64, r: 12, t: 12, b: 52 },
  height: SMALL ? 380 : 480,
  font: { family: "system-ui, sans-serif", size: SMALL ? 11 : 13 },
  legend: { orientation: "h", y: -0.2 },
  hovermode: "closest",
});
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: !SMALL };

// A logarithmic axis on which exact zeros stand at its lower end.
function logAxis(values, title) {
  const positive = values.filter((value) => value > 0);
  const least = positive.reduce((a, b) => Math.min(a, b), Infinity);
  const most = positive.reduce((a, b) => Math.max(a, b), 0);
  const zero = positive.length ? Math.floor(Math.log10(least)) - 1 : -9;
  const last = positive.length ? Math.ceil(Math.log10(most)) : 0;
  const stride = Math.max(1, Math.ceil((last - zero) / 7)), exponents = [];
  for (let n = last; n > zero; n -= stride) exponents.unshift(n);
  return {
    of: (value) => Math.max(value, 10 ** zero),
    axis: {
      type: "log", title: { text: title }, range: [zero - 0.3, last + 0.2],
      tickvals: [10 ** zero, ...exponents.map((n) => 10 ** n)],
      ticktext: ["0", ...exponents.map((n) => `10<sup>${n}</sup>`)],
    },
  };
}

function drawDots(shown, rows, at) {
  const of = shown.components, height = byId("height").value, classes = checked("class");
  const isLeft = height === "left";
  const values = isLeft && at ? at.left[at.look].map((v) => (v === null ? null : v / 1000)) : of[height];
  const across = logAxis(of.clean, "activity on clean inputs, nats");
  const label = byId("height").selectedOptions[0].textContent;
  const up = isLeft ? null : logAxis(values, height === "size" ? label : `${label}, nats`);
  const most = rows.reduce((sum, { i }) => Math.max(sum, of.size[i]), 0);
  const traces = shown.classes
    .filter(({ name }) => classes.has(name))
    .map(({ name, label, colour }) => {
      const dots = rows.filter(({ activity, i }) => activity === name && values[i] !== null);
      return {
        type: "scatter", mode: "markers", name: label,
        x: dots.map(({ i }) => across.of(of.clean[i])),
        y: dots.map(({ i }) => (up ? up.of(values[i]) : values[i])),
        customdata: dots.map(({ i }) => `${of.name[i]} ${of.seed[i]}`),
        text: dots.map(({ i, activity }) => told(of, i, activity, values[i], label, height)),
        hovertemplate: "%{text}<extra></extra>",
        marker: {
          color: colour, opacity: 0.75, line: { width: 0.5, color: "white" },
          size: dots.map(({ i }) => 4 + 14 * Math.sqrt(of.size[i] / most)),
        },
      };
    });
  const line = tolerance(shown);
  const shapes = [{ type: "line", x0: line, x1: line, yref: "paper", y0: 0, y1: 1, line: { dash: "dot" } }];
  if (height === "triggered" || height === "near_miss")
    shapes.push({ type: "line", y0: line, y1: line, xref: "paper", x0: 0, x1: 1, line: { dash: "dot" } });
  if (isLeft && at) {
    const law = at.null[at.look];
    if (law !== null)
      shapes.push({ type: "line", y0: law, y1: law, xref: "paper", x0: 0, x1: 1, line: { dash: "dash" } });
  }
  const pinned = rows.find(({ i }) => `${of.name[i]} ${of.seed[i]}` === pinnedName(shown));
  const annotations = pinned && values[pinned.i] !== null
    ? [{
        x: Math.log10(across.of(of.clean[pinned.i])),
        y: up ? Math.log10(up.of(values[pinned.i])) : values[pinned.i],
        text: escaped(of.name[pinned.i]), showarrow: true, arrowhead: 2,
      }]
    : [];
  const yaxis = up ? up.axis : { title: { text: "retention" }, range: [-0.3, 1.3] };
  return Plotly.react(
    "dots", traces, { ...LAYOUT(), xaxis: across.axis, yaxis, shapes, annotations }, CONFIG,
  );
}

function told(of, i, activity, value, label, height) {
  const lines = [
    `<b>${escaped(of.name[i])}</b>, seed ${of.seed[i]}: ${activity.replaceAll("_", " ")}`,
    `diff norm ${short(of.size[i])}`,
    `clean ${short(of.clean[i])} nats`,
  ];
  if (of.triggered) lines.push(`triggered ${short(of.triggered[i])} nats`);
  if (height === "left") lines.push(`retention ${short(value)}`);
  return lines.join("<br>");
}

function average(curves) {
  const sums = new Map();
  for (const { step, exposure, value } of curves)
    step.forEach((at, k) => {
      if (value[k] === null) return;
      const sum = sums.get(at) ?? { exposure: exposure[k], total: 0, count: 0 };
      sums.set(at, { ...sum, total: sum.total + value[k], count: sum.count + 1 });
    });
  return [...sums].sort(([a], [b]) => a - b).map(([step, sum]) => ({ step, ...sum, mean: sum.total / sum.count }));
}

function drawCurves(shown, at) {
  const measure = byId("measure").value, along = byId("along").value;
  const arms = checked("arm"), starts = checked("start"), seed = byId("seed").value, traces = [];
  for (const { key, name, colour } of shown.arms.filter(({ key }) => arms.has(key)))
    for (const { name: start, dash } of shown.starts.filter(({ name }) => starts.has(name))) {
      const curves = shown.behaviour.filter(
        (curve) =>
          curve.arm === key && curve.start === start && curve.measure === measure &&
          (seed === "" || curve.seed === Number(seed)),
      );
      const points = average(curves);
      if (points.length)
        traces.push({
          type: "scatter", mode: "lines+markers", name: `${name}, ${start}`,
          x: points.map((point) => point[along]), y: points.map(({ mean }) => mean),
          line: { color: colour, dash }, marker: { size: 4 },
          hovertemplate: `${escaped(name)}, ${start}<br>${along} %{x:.3g}: %{y:.3g}<extra></extra>`,
        });
    }
  const here = at && (along === "step" ? at.step : at.exposure)[at.look];
  const shapes = at
    ? [{ type: "line", x0: here, x1: here, yref: "paper", y0: 0, y1: 1, line: { dash: "dot", color: "#7f7f7f" } }]
    : [];
  const axes = { xaxis: { title: { text: along } }, yaxis: { title: { text: MEASURES[measure] } } };
  return Plotly.react("curves", traces, { ...LAYOUT(), ...axes, shapes, showlegend: !SMALL }, CONFIG);
}

// ---- The pinned component.

const pinnedName = (shown) => {
  const typed = byId("component").value.trim();
  if (!typed) return "";
  if (/ \d+$/.test(typed)) return typed;
  const seed = byId("seed").value || shown.components.seed[0];
  return `${typed} ${seed}`;
};

function pin(shown, name) {
  byId("component").value = name;
  draw(shown);
}

function drawPinned(shown, at) {
  const of = shown.components, name = pinnedName(shown);
  const i = name ? of.name.findIndex((each, k) => `${each} ${of.seed[k]}` === name) : -1;
  byId("pinned").hidden = i < 0;
  byId("unknown").hidden = !name || i >= 0;
  if (i < 0) return Promise.resolve();
  byId("pinned-name").textContent = `${of.name[i]}, seed ${of.seed[i]}`;
  const about = [["class", classOf(of, i, tolerance(shown), shown.floors).replaceAll("_", " ")]];
  about.push(["diff norm", of.size[i]], ["activity on clean inputs, nats", of.clean[i]]);
  for (const { name: outlook, label } of shown.outlooks) about.push([`activity ${label}, nats`, of[outlook][i]]);
  for (const { arm, left } of shown.retention) {
    const { name: called, decays } = shown.arms.find(({ key }) => key === arm);
    const last = left.at(-1)[i];
    if (decays && last !== null) about.push([`retention at the end: ${called}`, last / 1000]);
  }
  byId("pinned-numbers").replaceChildren(
    ...about.map(([label, value]) => {
      const made = row(label, typeof value === "string" ? [] : [value]);
      if (typeof value === "string") made.insertCell().textContent = value;
      return made;
    }),
  );
  const traces = [];
  for (const { arm, step, exposure, left, ...course } of shown.retention) {
    const { name: called, colour, decays } = shown.arms.find(({ key }) => key === arm);
    const along = byId("along").value === "step" ? step : exposure;
    if (byId("along").value !== "step" && !decays) continue; // it has no exposure to stand at
    const values = left.map((look) => (look[i] === null ? null : look[i] / 1000));
    if (values.every((value) => value === null)) continue;
    traces.push({
      type: "scatter", mode: "lines+markers", name: called, x: along, y: values, line: { color: colour },
      hovertemplate: `${escaped(called)}: %{y:.3f}<extra></extra>`,
    });
    if (decays)
      traces.push({
        type: "scatter", mode: "lines", name: `null law of ${called}`, x: along, y: course.null,
        line: { color: colour, width: 6 }, opacity: 0.25, showlegend: false, hoverinfo: "skip",
      });
  }
  const axes = { xaxis: { title: { text: byId("along").value } }, yaxis: { title: { text: "retention" } } };
  return Plotly.react("kept", traces, { ...LAYOUT(), ...axes, showlegend: !SMALL }, CONFIG);
}

function savePicture(plot) {
  const { width, height } = byId(plot).getBoundingClientRect();
  return Plotly.downloadImage(plot, { format: "svg", filename: plot, width, height });
}

// Folded text is printed too.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});

if (byId("data")) start().catch((error) => {
  byId("explorer-failed").hidden = false;
  byId("explorer-failed").textContent += ` (${error.message})`;
  console.error(error);
});
