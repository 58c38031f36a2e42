// The page's life: listen, remember what came, draw what has changed. Nothing is ever sent. A report has it all from
// the beginning.

import { draw } from "./parts.js";

const MOST = { happenings: 500, recoveries: 200 };
const SILENT_MS = 12000;

const known = { now: null, losses: new Map(), newest: null, every: 1, happenings: [], recoveries: [] };
let source = null;
let heardAt = Date.now();
let drawing = false;

function take(message) {
  const { now, history } = message;
  known.now = now;
  if (history.anew) for (const name of Object.keys(MOST)) known[name] = [];
  if (history.losses.anew) known.losses.clear();
  for (const [step, loss] of history.losses.points) known.losses.set(step, loss);
  known.newest = history.losses.newest;
  for (const [name, most] of Object.entries(MOST)) known[name] = known[name].concat(history[name]).slice(-most);
  heardAt = Date.now();
}

function redraw() {
  if (drawing || known.now === null) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    draw(known);
  });
}

function say(text, lost) {
  const link = document.getElementById("link");
  if (link.textContent !== text) link.textContent = text;
  document.body.classList.toggle("lost", lost);
}

function over() {
  return known.now !== null && known.now.outcome !== null;
}

function listen() {
  source = new EventSource("/api/events");
  source.onmessage = (event) => {
    take(JSON.parse(event.data));
    say(over() ? "the run has ended" : "live", false);
    if (over()) source.close(); // nothing more will come, and nobody will answer
    redraw();
  };
  source.onerror = () => {
    if (over()) return;
    say("not connected: the controller may be restarting, or the run has ended", true);
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000); // refused: the browser itself gives up
  };
}

function show(kept) {
  take(kept);
  say(over() ? "as it was at its end" : `as it was at ${new Date(kept.now.unix * 1000).toLocaleString()}`, false);
  redraw();
}

function watch() {
  setInterval(() => {
    if (!over() && source.readyState === EventSource.OPEN && Date.now() - heardAt > SILENT_MS) {
      say("nothing has been heard for a while", true);
    }
  }, 2000);
  listen();
}

new ResizeObserver(redraw).observe(document.getElementById("loss"));
const kept = document.getElementById("kept"); // a report has in it all that it shows
if (kept === null) watch();
else show(JSON.parse(kept.textContent));
