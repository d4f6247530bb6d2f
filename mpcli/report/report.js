"use strict";
// The report's own script: it shows Bokeh's charts and connects the page's controls with them.
// Text from the run reaches the page as text only: nothing here builds markup from strings.

const LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const data = JSON.parse(document.getElementById("data").textContent);
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

async function main() {
  const places = Object.fromEntries(all(".plot").map((place) => [place.dataset.root, place]));
  if (!Object.keys(places).length) return;
  await Bokeh.embed.embed_items(
    { report: data.document },
    [{ docid: "report", roots: places, root_ids: data.document.roots.map((root) => root.id) }],
  );
  const charts = Bokeh.documents[0];
  const figures = new Map(
    all(".chart").map((chart) => [chart, figureOf(charts, chart.dataset.chart)]),
  );
  useTheme(charts);
  connectSeries(figures);
  connectAxes(figures);
  // A double tap would undo a zoom, to ranges from before those of this script.
  for (const figure of figures.values()) figure.toolbar.gestures.doubletap.active = null;
  // Later, for Bokeh's own zoom puts back the other axis after this one.
  const fitAll = () => queueMicrotask(() => { for (const figure of figures.values()) fit(figure); });
  charts.get_model_by_name("steps")?.change.connect(fitAll);
  if (one("#toolbar")) {
    connectZoom(charts.get_model_by_name("steps"));
    connectCursor(charts, figures);
  }
  if (one("#layers-run")) await connectLayers(charts, one('[data-chart="exponents"]'));
  document.documentElement.dataset.ready = "true";
}

function useTheme(charts) {
  const names = {
    outline_line_color: "--line", axis_line_color: "--line", major_tick_line_color: "--line", minor_tick_line_color: "--line",
    major_label_text_color: "--text", axis_label_text_color: "--text", grid_line_color: "--grid",
    title_text_color: "--text", bar_line_color: "--line",
  };
  const backgrounds = { Figure: "--plot", Label: "--plot", ColorBar: "--page" };
  const apply = () => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    for (const model of charts.all_models) {
      for (const [property, name] of Object.entries(names)) {
        if (property in model.properties) model[property] = color(name);
      }
      if (model.type in backgrounds) model.background_fill_color = color(backgrounds[model.type]);
      if (model.type === "LogColorMapper") model.low_color = color("--zero");
      if (model.name === "cursor") model.line_color = color("--text");
      if (model.tags?.[0] === "limit") {
        if ("line_color" in model.properties) model.line_color = color("--limit");
        if ("text_color" in model.properties) model.text_color = color("--limit");
      }
    }
  };
  apply();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
}

/** What Python wrote about a renderer: an object, whichever way Bokeh read it. */
function about(model) {
  const told = model.tags[0];
  return told instanceof Map ? Object.fromEntries(told) : (told ?? {});
}

function connectSeries(figures) {
  const runs = all("[data-run]");
  const apply = () => {
    for (const [chart, figure] of figures) {
      const hidden = all("[data-series]", chart)
        .filter((box) => !box.checked).map((box) => box.dataset.series);
      for (const renderer of figure.renderers) {
        const { run, series } = about(renderer);
        if (series === undefined) continue;
        renderer.visible = !hidden.includes(series) && (runs[run]?.checked ?? true);
      }
      fit(figure);
    }
  };
  for (const box of all("[data-run], [data-series]")) box.addEventListener("change", apply);
  apply();
}

function connectAxes(figures) {
  for (const [chart, figure] of figures) {
    const box = one("[data-log]", chart);
    box?.addEventListener("change", () => {
      const { scales, axes } = Object.fromEntries(
        Object.entries(about(figure)).map(
          ([key, value]) => [key, value instanceof Map ? Object.fromEntries(value) : value]),
      );
      const kind = box.checked ? "log" : "linear";
      figure.y_scale = scales[kind];
      for (const [name, axis] of Object.entries(axes)) axis.visible = name === kind;
      fit(figure);
    });
  }
}

/** Give a chart the range of its points that are seen, and of those that a line goes to from there. */
function fit(figure) {
  if (MAPS.includes(figure.name)) return;
  const isLog = figure.y_scale.type === "LogScale";
  const [start, end] = figure.x_range.name === "steps"
    ? [figure.x_range.start, figure.x_range.end] : [-Infinity, Infinity];
  let [low, high] = [Infinity, -Infinity];
  for (const renderer of figure.renderers) {
    const { column } = about(renderer);
    if (column === undefined || !renderer.visible) continue;
    const [steps, values] = ["step", column].map((key) => renderer.data_source.get(key));
    for (let index = Math.max(0, lastUpTo(steps, start)); index < steps.length; index += 1) {
      const value = values[index];
      const inside = steps[index] < start ? index + 1 : steps[index] > end ? index - 1 : index;
      const isDrawn = inside === index
        || (renderer.glyph.type !== "Scatter" && Number.isFinite(values[inside]));
      if (isDrawn && Number.isFinite(value) && !(isLog && value <= 0)) {
        [low, high] = [Math.min(low, value), Math.max(high, value)];
      }
      if (steps[index] > end) break;
    }
  }
  if (low > high) [low, high] = [1, 1];
  if (isLog) {
    const margin = low === high ? 2 : (high / low) ** 0.05;
    figure.y_range.setv({ start: low / margin, end: high * margin });
  } else { // a constant is in the middle of an axis that begins at 0
    const margin = low === high ? Math.abs(low) || 1 : (high - low) * 0.05;
    figure.y_range.setv({ start: low - margin, end: high + margin });
  }
}

function connectZoom(steps) {
  const [first, last] = [steps.start, steps.end];
  const show = (start, end) => {
    const width = Math.min(Math.max(end - start, 1), last - first);
    const begin = Math.min(Math.max(start, first), last - width);
    steps.setv({ start: begin, end: begin + width });
  };
  const actions = {
    in: (centre, width) => show(centre - width / 4, centre + width / 4),
    out: (centre, width) => show(centre - width, centre + width),
    left: (_, width) => show(steps.start - width / 4, steps.end - width / 4),
    right: (_, width) => show(steps.start + width / 4, steps.end + width / 4),
    all: () => show(first, last),
  };
  for (const button of all("[data-zoom]")) {
    button.addEventListener("click", () => {
      const chosen = Number(one("#cursor").value);
      const inside = one("#cursor").dataset.chosen && chosen >= steps.start && chosen <= steps.end;
      const centre = inside ? chosen : (steps.start + steps.end) / 2;
      actions[button.dataset.zoom](centre, steps.end - steps.start);
    });
  }
}

function connectCursor(charts, figures) {
  const slider = one("#cursor");
  const cursor = charts.get_model_by_name("cursor");
  slider.max = data.last_step;
  const show = (step) => {
    slider.value = step;
    slider.dataset.chosen = "true";
    one("#cursor-step").value = `step ${step.toLocaleString("en")}`;
    for (const [chart, figure] of figures) {
      const told = MAPS.includes(figure.name) // a cell begins at its step
        ? mapReadout(figure, cursor.location) : readout(figure, step);
      one(".readout", chart).textContent = told;
    }
  };
  slider.addEventListener("input", () => {
    cursor.location = Number(slider.value);
    show(Number(slider.value));
  });
  // The mouse moves the same line, in the units of the data; where it leaves, the line stays.
  let waiting = false;
  cursor.properties.location.change.connect(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const step = Math.round(cursor.location);
      if (step >= 1 && step <= Number(slider.max)) show(step);
      else if (slider.dataset.chosen) cursor.location = Number(slider.value);
    });
  });
}

/** The values of a chart's visible curves at a step, or at the last one before it that is shown. */
function readout(figure, step) {
  const told = new Map();
  for (const renderer of figure.renderers) {
    const { run, series, column } = about(renderer);
    if (run === undefined || column === undefined || !renderer.visible) continue;
    if (renderer.glyph.type === "Scatter") { // of a line, which tells more, unless it is a mark
      const marked = ["skipped", "nonfinite"].includes(series);
      if (marked && [...renderer.data_source.get("step")].includes(step)) {
        told.set(renderer.name, "here");
      }
      continue;
    }
    const steps = renderer.data_source.get("step");
    const index = lastUpTo(steps, step);
    if (index < 0) continue;
    const value = renderer.data_source.get(column)[index];
    const at = steps[index] === step ? "" : ` (at step ${steps[index].toLocaleString("en")})`;
    told.set(renderer.name, `${number(value)}${at}`);
  }
  return [...told].map(([name, text]) => `${name} ${text}`).join(" · ");
}

const MAPS = ["exponents", "layers"];
const MOST_CELLS = 5; // of a map, in words

/** The largest cells of a map in the column at a step. */
function mapReadout(figure, step) {
  const source = figure.renderers[0].data_source;
  const [left, right, value] = ["left", "right", "value"].map((key) => source.get(key));
  const here = [...left.keys()].filter((cell) => left[cell] <= step && step < right[cell]);
  if (!here.length) return "";
  here.sort((a, b) => (value[a] < value[b]) - (value[a] > value[b]));
  const told = here.slice(0, MOST_CELLS).map((cell) => source.get("words")[cell]);
  if (here.length > MOST_CELLS) told.push(`${here.length - MOST_CELLS} smaller ones`);
  return `at step ${left[here[0]].toLocaleString("en")}: ${told.join(" · ")}`;
}

function lastUpTo(steps, step) {
  let [low, high] = [0, steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1; else high = middle;
  }
  return low - 1;
}

function number(value) {
  if (!Number.isFinite(value)) return "not finite";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  return Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function connectLayers(charts, exponents) {
  const runs = await inflated(data.layers);
  for (const { quantities } of runs.flat()) {
    for (const key in quantities) quantities[key] = quantities[key].split(",").map(quantityOf);
  }
  const [run, kind, name, quantity] =
    ["run", "tensor", "name", "quantity"].map((key) => one(`#layers-${key}`));
  const wide = one("[data-wide]", exponents);
  let asked; // quantity that a person chose
  const tensors = () => runs[Number(run.value)].filter((tensor) => tensor.tensor === kind.value);
  const draw = () => {
    const shown = tensors();
    drawExponents(charts, shown[Number(name.value)], wide.checked);
    drawMap(charts, shown, quantity.value);
    const [tensorKind, what] = [kind, quantity].map((select) => select.selectedOptions[0].textContent);
    one("h3", exponents).textContent = `Exponents over time: ${tensorKind}, ${name.selectedOptions[0].textContent}`;
    one('[data-chart="layers"] h3').textContent = `All tensors over time: ${tensorKind}, ${what}`;
    const cursor = one("#cursor");
    if (cursor.dataset.chosen) cursor.dispatchEvent(new Event("input")); // what stands below
  };
  const choose = () => {
    const shown = tensors();
    options(name, shown.map((tensor, index) => [String(index), tensor.name]));
    const known = Object.keys(data.quantities)
      .filter((key) => shown.some((tensor) => key in tensor.quantities));
    options(quantity, known.map((key) => [key, data.quantities[key]]));
    quantity.value = asked in data.quantities && known.includes(asked) ? asked
      : known.find((key) => shown.some((tensor) => tensor.quantities[key]?.some(Number))) ?? known[0];
    draw();
  };
  for (const select of [run, kind]) select.addEventListener("change", choose);
  quantity.addEventListener("change", () => { asked = quantity.value; });
  for (const control of [name, quantity, wide]) control.addEventListener("change", draw);
  choose();
}

/** As Python writes numbers. */
function quantityOf(text) {
  return text === "inf" ? Infinity : Number(text);
}

/** Replace the options of a select; the text that was chosen stays, where it is still there. */
function options(select, choices) {
  const before = select.selectedOptions[0]?.textContent;
  select.replaceChildren(...choices.map(([value, words]) => new Option(words, value)));
  const same = [...select.options].find((option) => option.textContent === before);
  if (same) select.value = same.value;
}

/** From each sampled step to the next one, but no farther than twice the usual way. */
function columnsOf(steps) {
  const gaps = steps.slice(1).map((step, index) => step - steps[index]).sort((a, b) => a - b);
  const usual = gaps[gaps.length >> 1] ?? 1;
  return steps.map((step, index) => [step, Math.min(steps[index + 1] ?? Infinity, step + usual * 2,
    index + 1 < steps.length ? Infinity : step + usual)]);
}

function cellsOf(keys) {
  return Object.fromEntries(keys.map((key) => [key, []]));
}

function drawExponents(charts, tensor, wide) {
  const cells = cellsOf(["left", "right", "bottom", "top", "value", "step", "words", "hatch"]);
  let [low, high] = [-26, 18];
  const columns = columnsOf(tensor?.steps ?? []);
  columns.forEach(([left, right], index) => {
    [...tensor.cells[index]].forEach((character, offset) => {
      const level = LEVELS.indexOf(character);
      if (!level) return;
      const share = data.smallest_share ** (1 - (level - 1) / 62);
      const exponent = tensor.lowest[index] + offset;
      [low, high] = [Math.min(low, exponent), Math.max(high, exponent + 1)];
      const words = `2^${exponent} ${Number((100 * share).toPrecision(2))}%`;
      add(cells, { left, right, bottom: exponent, top: exponent + 1, value: share, step: left,
        words, hatch: " " });
    });
  });
  if (wide) [low, high] = [Math.min(low, -150), Math.max(high, 150)];
  columns.forEach(([left, right], index) => {
    if (tensor.cells[index] || tensor.quantities.nonfinite?.[index] !== 1) return;
    add(cells, { left, right, bottom: low, top: high, value: NaN, step: left,
      words: "all values are NaN or infinite", hatch: "x" });
  });
  charts.get_model_by_name("exponents-cells").data = cells;
  figureOf(charts, "exponents").y_range.setv({ start: low - 1, end: high + 1 });
}

function add(cells, cell) {
  for (const key of Object.keys(cells)) cells[key].push(cell[key]);
}

function figureOf(charts, name) {
  return charts.roots().find((root) => root.name === name);
}

const ROW = 16; // pixels
const LONGEST = 44; // characters of a name on the axis

function drawMap(charts, tensors, quantity) {
  const cells = cellsOf(["left", "right", "bottom", "top", "value", "step", "words", "shade"]);
  const shown = tensors.filter((tensor) => quantity in tensor.quantities);
  const figure = figureOf(charts, "layers");
  shown.forEach((tensor, row) => {
    const bottom = shown.length - 1 - row;
    columnsOf(tensor.steps).forEach(([left, right], index) => {
      const value = tensor.quantities[quantity][index];
      if (Number.isNaN(value)) return;
      add(cells, { left, right, bottom, top: bottom + 1, value, step: left,
        words: `${tensor.name} ${number(value)}` });
    });
  });
  const positive = cells.value.filter((value) => value > 0 && Number.isFinite(value));
  const largest = positive.reduce((a, b) => Math.max(a, b), 0) || 1;
  const smallest = positive.reduce((a, b) => Math.min(a, b), largest);
  const low = Math.min(Math.max(smallest, largest * 1e-6), largest / 10);
  charts.get_model_by_name("layers-log").setv({ low, high: largest });
  cells.shade = cells.value.map((value) => (value > 0 ? Math.max(value, low) : 0));
  charts.get_model_by_name("layers-cells").data = cells;
  figure.y_range.setv({ start: 0, end: Math.max(1, shown.length) });
  figure.height = Math.min(1200, Math.max(160, 60 + ROW * shown.length));
  const every = Math.ceil(shown.length / 70);
  const axis = figure.left[0];
  const ticks = shown.map((_, row) => row).filter((row) => row % every === 0);
  const PlainText = Bokeh.Models.get("PlainText"); // a name with dollars is no TeX
  axis.major_label_overrides = new Map(ticks.map((row) => [shown.length - row - 0.5,
    new PlainText({ text: short(shown[row].name) })]));
  axis.ticker.ticks = ticks.map((row) => shown.length - row - 0.5);
}

function short(name) {
  const half = LONGEST >> 1;
  return name.length <= LONGEST ? name : `${name.slice(0, half)}…${name.slice(-half)}`;
}

main();
