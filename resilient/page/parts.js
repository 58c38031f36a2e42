// The parts of the page, each drawn from what is known, and only when something in it has changed.

import { bytes, curve, element, plain, seconds, stackedBar } from "./drawing.js";

const PHASES = [["detect", "detect"], ["decide", "decide"], ["form", "form"], ["redo", "compute again"]];
const PLANNED = ["joined", "drained", "dealt anew"];
const STATES = ["productive", "starting", "blocked", "detecting", "forming", "restoring", "replaying", "waiting"];
const SIGNS = { computing: "▶", waiting: "○", paused: "‖", stopped: "■", starting: "…", connecting: "⇄", ready: "✓", ended: "□", unknown: "?" };
const MANY_RANKS = 48;
const MOST_SHOWN = 60;
const MOST_GROUPS = 6;

const drawn = new Map();
const at = (id) => document.getElementById(id);

export function draw(known) {
  const { now } = known;
  changed("head", [now.run, now.attempt, now.state, now.detail], () => head(now));
  tiles(now);
  changed("loss", [known.newest, known.losses.size, known.recoveries.length, at("loss").clientWidth], () => loss(known));
  spent(now);
  changed("snapshots", [now.snapshots, now.checkpoints, now.protection, durableSteps(known)], () => snapshots(now, known));
  changed("recoveries", [known.recoveries.at(-1), now.recovering === null, Math.round(now.recovering_s * 2)], () => recoveries(now, known));
  changed("nodes", [now.ranks, now.others, now.nodes, now.leaving, now.protection], () => nodes(now));
  changed("happenings", [known.happenings.length, known.happenings.at(-1)], () => happenings(known));
  changed("messages", now.messages, () => at("messages").replaceChildren(...now.messages.toReversed().map((text) => element("li", {}, text))));
}

function changed(name, inputs, redraw) {
  const text = JSON.stringify(inputs);
  if (drawn.get(name) === text) return;
  drawn.set(name, text);
  redraw();
}

function tone(state) {
  if (state === "training" || state === "finished") return "good";
  return state === "failed" ? "bad" : "busy";
}

function head(now) {
  document.title = `${now.run}: ${now.state}`;
  at("run").textContent = now.run;
  at("attempt").textContent = `attempt ${now.attempt}`;
  at("state").textContent = now.state;
  at("state").className = `badge ${tone(now.state)}`;
  at("detail").textContent = now.detail;
  at("events-file").textContent = now.observe.events === null ? "" : `events: ${now.observe.events}`;
}

function tiles(now) {
  const { productive, share } = goodput(now);
  const rows = [
    [now.steps ? `Step of ${plain(now.steps)}` : "Step", plain(now.step), now.step > 0 ? `${seconds(now.committed_s_ago)} ago` : ""],
    ["Loss", plain(now.loss), ""],
    ["A step takes", now.step_s > 0 ? seconds(now.step_s) : "–", ""],
    ["Generation", plain(now.generation), ""],
    ["Ranks", plain(now.ranks.length), `of ${now.wanted.min === now.wanted.max ? "" : `${now.wanted.min} to `}${now.wanted.max}`],
    ["Productive", share === null ? "–" : `${(100 * share).toFixed(1)} %`, share === null ? "" : seconds(productive)],
  ];
  changed("tiles", rows, () => at("tiles").replaceChildren(...rows.map(([name, value, more]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value, " ", element("small", {}, more))))));
}

function goodput(now) {
  const total = Object.values(now.spent).reduce((sum, value) => sum + value, 0);
  return { productive: now.spent.productive, total, share: now.spent.productive > 0 ? now.spent.productive / total : null };
}

function loss(known) {
  const points = [...known.losses].sort((one, other) => one[0] - other[0]);
  if (known.newest !== null && !known.losses.has(known.newest[0])) points.push(known.newest);
  if (points.length === 0) return;
  const marks = known.recoveries.map((found) => [found.step, PLANNED.includes(found.recovery) ? "planned" : "",
    PLANNED.includes(found.recovery) ? "○" : "✕", `step ${found.step}: ${found.recovery}: ${found.reason}`]);
  const failures = marks.filter((mark) => mark[1] === "").length;
  const words = ([step, value]) => `step ${plain(step)}: loss ${value === null ? "not finite" : plain(value)}`;
  const show = (point) => { at("loss-at").textContent = words(point); };
  curve(at("loss"), points, marks, `Loss by step. Newest: ${words(points.at(-1))}. Recoveries from failures marked: ${failures}.`, show);
  show(points.at(-1));
  at("loss-legend").textContent = marks.length === 0 ? "" : "✕ recovery from a failure   ○ planned change";
}

function spent(now) {
  const { total } = goodput(now);
  const parts = STATES.filter((state) => now.spent[state] > 0).map((state) =>
    [state, now.spent[state], `${state}: ${seconds(now.spent[state])}, ${((100 * now.spent[state]) / total).toFixed(1)} %`]);
  changed("spent", parts.map((part) => part[2]), () => {
    if (parts.length === 0) return at("spent").replaceChildren(element("p", { class: "quiet" }, "No step has been committed yet."));
    const sum = parts.reduce((all, part) => all + part[1], 0);
    const facts = parts.flatMap(([state, value]) => [
      element("dt", {}, element("span", { class: `swatch ${state}`, "aria-hidden": "true" }), state),
      element("dd", {}, `${((100 * value) / total).toFixed(1)} %, ${seconds(value)}`)]);
    return at("spent").replaceChildren(
      stackedBar(parts, sum, parts.map((part) => part[2]).join("; ")), element("dl", { class: "facts spaced" }, ...facts));
  });
}

function durableSteps(known) {
  return known.happenings.filter((found) => found.kind === "checkpoint durable").map((found) => found.step).slice(-8);
}

function snapshots(now, known) {
  const { snapshots: told, checkpoints, protection } = now;
  const groups = new Map(Object.values(protection).map((ring) => [ring.group, ring]));
  const facts = [];
  const fact = (name, value) => facts.push(element("dt", {}, name), element("dd", {}, value));
  const step = (value) => (value === undefined || value < 0 ? "none yet" : `step ${plain(value)}`);
  if (now.protected_s_ago === null) fact("Snapshots", "not asked for");
  else {
    const behind = told.newest >= 0 ? told.newest - Math.max(told.protected ?? 0, 0) : null;
    fact("Newest captured", step(told.newest));
    fact("Protected everywhere", step(told.protected) + (behind > 0 ? `, ${plain(behind)} behind` : ""));
    if (told.interval) fact("Taken every", told.interval === 1 ? "step" : `${plain(told.interval)} steps`);
    if (told.state_bytes) fact("State", bytes(told.state_bytes));
    const rings = [...groups.values()];
    const shown = rings.length > MOST_GROUPS ? rings.filter((ring) => ring.keepers < ring.nodes).slice(0, MOST_GROUPS) : rings;
    for (const ring of shown) fact(`Group ${ring.group + 1}`, groupInWords(ring));
    if (shown.length < rings.length) fact("All groups", `${plain(rings.length)}, of which ${plain(rings.filter((ring) => ring.keepers < ring.nodes).length)} lack keepers`);
  }
  if (now.durable_s_ago === null) fact("Checkpoints", "not asked for");
  else {
    fact("Newest durable", step(checkpoints.durable));
    const steps = durableSteps(known);
    if (steps.length > 1) fact("Durable steps", steps.map(plain).join(", "));
    fact("Written", `${plain(checkpoints.committed)}${checkpoints.failures ? `, ${plain(checkpoints.failures)} failed: ${checkpoints.last_failure}` : ""}`);
  }
  at("snapshots").replaceChildren(element("dl", { class: "facts" }, ...facts));
}

function groupInWords(ring) {
  const lost = ring.nodes - ring.keepers;
  const there = `${ring.keepers} of ${ring.nodes} keepers are there`;
  if (ring.parity === 0) return `${there}; no parity: ${ring.nodes === 1 ? "a node alone" : "none asked for"}`;
  return `${there}; ${lost < ring.parity ? `survives the loss of ${ring.parity - lost}${lost > 0 ? " more" : ""}` : "another loss costs protection"}`;
}

function recoveries(now, known) {
  const shown = known.recoveries.slice(-MOST_SHOWN).reverse();
  const open = now.recovering;
  if (shown.length === 0 && open === null) {
    return at("recoveries").replaceChildren(element("p", { class: "quiet" }, "None so far."));
  }
  const longest = Math.max(...shown.map((found) => found.total_s), open === null ? 0 : now.recovering_s, 1e-3);
  const rows = shown.map((found) => {
    const parts = PHASES.map(([phase, name]) => [phase, found[`${phase}_s`], `${name}: ${seconds(found[`${phase}_s`])}`]);
    const words = parts.filter((part) => part[1] > 0).map((part) => part[2]).join(", ");
    return row(clock(found.unix), found.step, found.recovery, found.reason, seconds(found.total_s), stackedBar(parts, longest, words), words);
  });
  if (open !== null) {
    const bar = stackedBar([["waiting", now.recovering_s, "under way"]], longest, `under way for ${seconds(now.recovering_s)}`);
    rows.unshift(row("now", "", open.kind, open.reason, seconds(now.recovering_s), bar, "under way"));
  }
  const names = ["Time", "Step", "Kind", "Why", "Took", "Phases"];
  return at("recoveries").replaceChildren(
    element("p", { class: "legend" }, element("span", {}, ...PHASES.flatMap(([phase, name]) => [
      element("span", { class: `swatch ${phase}`, "aria-hidden": "true" }), `${name}   `]))),
    element("table", {}, element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...rows)));
}

function row(time, step, kind, reason, took, bar, words) {
  return element("tr", {}, element("td", {}, element("time", {}, time)), element("td", { class: "number", "data-name": step === "" ? null : "Step" }, step === "" ? "" : plain(step)),
    element("td", {}, element("strong", {}, kind)), element("td", { class: "reason" }, reason),
    element("td", { class: "number", "data-name": "Took" }, took), element("td", { class: "phases" }, bar, element("small", { class: "quiet" }, words)));
}

function nodes(now) {
  const places = new Map(Object.keys(now.nodes).map((node) => [node, []]));
  for (const process of [...now.ranks, ...now.others]) {
    if (!places.has(process.node)) places.set(process.node, []);
    places.get(process.node).push(process);
  }
  const many = now.ranks.length + now.others.length > MANY_RANKS;
  const states = [...new Set([...now.ranks, ...now.others].map((process) => process.state))].sort();
  at("nodes-legend").textContent = `Ranks: ${plain(now.ranks.length)}, other processes: ${plain(now.others.length)}, nodes: ${plain(places.size)}. `
    + (many ? states.map((state) => `${SIGNS[state] ?? "?"} ${state}`).join("   ") : "");
  at("nodes").classList.toggle("many", many);
  const troubled = ([node, processes]) => now.leaving[node] !== undefined || processes.some((process) => process.state === "stopped");
  const order = many ? [...places].sort((one, other) => troubled(other) - troubled(one)) : [...places]; // what matters is not to be scrolled to
  at("nodes").replaceChildren(...order.map(([node, processes]) => nodeCard(now, node, processes, many)));
}

function nodeCard(now, node, processes, many) {
  const ring = now.protection[node];
  const leaving = now.leaving[node];
  const words = leaving !== undefined ? `leaving: ${leaving.why}` : ring !== undefined
    ? `snapshot group ${ring.group + 1}, ${ring.parity > 0 ? "parity on others" : "no parity"}` : "";
  const empty = processes.length === 0 ? "no process of this run" : null;
  return element("li", { "data-node": node }, element("h3", { title: node }, node.slice(0, 8)),
    many ? null : element("p", { class: "quiet" }, [empty, words].filter(Boolean).join("; ")),
    element("ul", { class: "ranks", "aria-label": `Processes on node ${node.slice(0, 8)}` }, ...processes.map((process) => chip(process, many))));
}

function chip(process, many) {
  const name = process.rank === undefined ? `member ${process.member}` : `rank ${process.rank}`;
  const more = [process.layers && `layers ${process.layers[0]}–${process.layers[1] - 1}`,
    process.speed && Math.abs(process.speed - 1) > 0.1 && `speed ${plain(process.speed)}`].filter(Boolean).join(", ");
  const words = `${name}, ${process.state}${more ? `, ${more}` : ""}`;
  const kind = process.state === "stopped" ? "bad" : process.rank === undefined || process.state === "ended" ? "idle" : ["computing", "waiting"].includes(process.state) ? "good" : "busy";
  const sign = SIGNS[process.state] ?? "?";
  const text = many ? `${process.rank ?? "–"} ${sign}` : `${sign} ${words}`;
  return element("li", { class: kind, title: words, ...(many ? { "aria-label": words } : {}) }, text);
}

function happenings(known) {
  at("happenings").replaceChildren(...known.happenings.slice(-MOST_SHOWN).reverse().map((found) => {
    const who = [found.rank !== undefined && found.rank !== null && `rank ${found.rank}`, found.node && `node ${found.node.slice(0, 8)}`].filter(Boolean).join(", ");
    return element("li", {}, element("time", { datetime: found.time }, clock(found.unix)), element("span", {}, element("strong", {}, found.kind)),
      element("span", {}, [who, found.reason].filter(Boolean).join(": ")));
  }));
}

function clock(unix) {
  return new Date(unix * 1000).toLocaleTimeString([], { hour12: false });
}
