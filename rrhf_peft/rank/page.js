// The annotator's page and the overview. Everything that comes from data enters as text, except the HTML that the
// server's Markdown parser made, which passes no markup through.

const at = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  return answer.json();
}

// Ask until there is an answer: a server that is being restarted costs nothing but time.
async function surely(path, body) {
  for (;;) {
    try {
      const answer = await ask(path, body);
      at("notice").hidden = true;
      return answer;
    } catch (error) {
      const isHopeless = error.status && error.status < 500;
      at("notice").hidden = false;
      at("notice").textContent = isHopeless
        ? `The server refused this (${error.status}). Reload the page.`
        : `Not kept yet: ${error.status ? "the server cannot write" : "the server does not answer"}. Trying again …`;
      if (isHopeless) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

// ---- An annotator ranks ----

let task = null;
let current = 0;
let busy = false;
let plain = false;
let queue = Promise.resolve(); // answers reach the server one after the other

async function load(group) {
  busy = true;
  try {
    task = await surely(group === undefined ? "task" : `task?group=${group}`);
    if (task.overview) await overview();
    else show();
  } finally {
    busy = false;
  }
}

function text(value) {
  const box = element("div", { className: plain ? "text plain" : "text" });
  if (!value.text.trim()) box.append(element("span", { className: "empty" }, "(empty)"));
  else if (plain) box.textContent = value.text;
  else box.innerHTML = value.html;
  for (const link of box.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  return box;
}

function show() {
  at("annotate").hidden = false;
  const done = task.ranked + task.skipped;
  at("count").textContent = `${task.name}: ${done} of ${task.total}${task.skipped ? ` (${task.skipped} skipped)` : ""}`;
  at("bar").max = Math.max(1, task.total);
  at("bar").value = done;
  at("guidelines").innerHTML = task.guidelines;
  at("layout").hidden = Boolean(task.finished);
  at("finished").hidden = !task.finished;
  at("again").hidden = task.before === null;
  if (task.finished) return;
  const roles = task.prompt.length > 1 || task.prompt[0].role !== "user";
  at("prompt").replaceChildren(
    ...task.prompt.map((turn) => element("div", { className: "turn" },
      element("span", { className: "role" }, roles ? turn.role : "Prompt"), text(turn))),
  );
  at("cards").className = isPair() ? "pair" : "";
  at("cards").replaceChildren(...task.responses.map(card));
  at("note").value = task.note;
  at("notes").open = Boolean(task.note);
  at("before").disabled = task.before === null;
  current = Math.max(0, task.responses.findIndex((response) => response.rank === null));
  refresh();
  window.scrollTo(0, 0);
}

const isPair = () => task.responses.length === 2;
const isComplete = () => task.responses.every((response) => response.rank !== null);

function card(response, index) {
  const head = element("div", {}, letter(index));
  if (!isPair()) head.append(rankButtons(index));
  const made = element("article", { className: "card" }, head, text(response));
  made.onclick = (event) => event.target.closest(".ranks") || mark(index); // a rank's own click marks the card, too
  made.setAttribute("aria-label", `Response ${response.label}`);
  return made;
}

function rankButtons(index) {
  const ranks = element("fieldset", { className: "ranks" });
  ranks.setAttribute("aria-label", `Rank of ${task.responses[index].label}`);
  task.responses.forEach((_, position) => {
    const button = element("input", { type: "radio", name: `rank-${index}`, value: position + 1 });
    button.onchange = () => rank(index, position + 1);
    ranks.append(element("label", {}, button, element("span", {}, `${position + 1}`)));
  });
  return ranks;
}

function letter(index) {
  const made = element("span", { className: "letter", title: isPair() ? "" : "Drag to a rank" }, task.responses[index].label);
  if (!isPair()) made.onpointerdown = (event) => drag(event, index);
  return made;
}

// What changes with a rank: the marks on the cards, and the dock.
function refresh() {
  [...at("cards").children].forEach((made, index) => {
    const given = task.responses[index].rank;
    made.classList.toggle("current", index === current && !isPair());
    made.classList.toggle("ranked", given !== null && (!isPair() || given === 1));
    for (const button of made.querySelectorAll(".ranks input")) button.checked = Number(button.value) === given;
  });
  at("tiers").replaceChildren(...(isPair() ? choices() : tiers()));
  at("submit").disabled = !isComplete();
}

function tiers() {
  const rows = task.responses.map((_, position) => tier(position + 1, `${position + 1}`));
  return task.responses.some((response) => response.rank === null) ? [...rows, tier(0, "to rank")] : rows;
}

function tier(rank, title) {
  const row = element("div", { className: "tier" }, element("b", {}, title));
  row.dataset.rank = rank;
  task.responses.forEach((response, index) => {
    if ((response.rank ?? 0) === rank) row.append(letter(index));
  });
  return row;
}

const CHOICES = [["← A is better", [1, 2]], ["Tie", [1, 1]], ["B is better →", [2, 1]]];

function choices() {
  return CHOICES.map(([title, ranks]) => {
    const button = element("button", { type: "button", className: "choice", onclick: () => choose(ranks) }, title);
    button.setAttribute("aria-pressed", ranks.every((value, index) => task.responses[index].rank === value));
    return button;
  });
}

function choose(ranks) {
  ranks.forEach((value, index) => { task.responses[index].rank = value; });
  changed();
}

function rank(index, value) {
  task.responses[index].rank = value || null;
  current = index;
  changed();
}

function changed() {
  refresh();
  if (task.state === "open") send("open");
}

function send(state) {
  const ranks = task.responses.map((response) => response.rank);
  const body = { group: task.group, state, ranks, note: at("note").value };
  queue = queue.catch(() => {}).then(() => surely("answer", body));
  return queue;
}

function mark(index, scroll = false) {
  current = Math.min(Math.max(index, 0), task.responses.length - 1);
  refresh();
  if (scroll) at("cards").children[current].scrollIntoView({ block: "nearest" });
}

async function finish(state) {
  if (busy || (state === "ranked" && !isComplete())) return;
  busy = true;
  try {
    await send(state);
    await load(task.after ?? undefined);
  } finally {
    busy = false;
  }
}

function back() {
  if (!busy && task.before !== null) load(task.before).catch(() => {});
}

// A letter is drawn to a rank with the mouse, a pen or a finger.
function drag(event, index) {
  if (event.button) return;
  event.preventDefault();
  mark(index);
  const ghost = element("span", { className: "letter ghost" }, task.responses[index].label);
  let target = null;
  const move = (now) => {
    if (!ghost.isConnected && Math.hypot(now.clientX - event.clientX, now.clientY - event.clientY) < 6) return;
    document.body.append(ghost);
    ghost.style.transform = `translate(${now.clientX - 16}px, ${now.clientY - 16}px)`;
    target?.classList.remove("over");
    target = document.elementFromPoint(now.clientX, now.clientY)?.closest(".tier");
    target?.classList.add("over");
  };
  const end = (now) => {
    for (const [name, handler] of Object.entries(handlers)) window.removeEventListener(name, handler);
    ghost.remove();
    if (target && now.type === "pointerup") rank(index, Number(target.dataset.rank));
    else refresh();
  };
  const handlers = { pointermove: move, pointerup: end, pointercancel: end };
  for (const [name, handler] of Object.entries(handlers)) window.addEventListener(name, handler);
}

function press(event) {
  if (!task || task.overview || event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
  if (event.target === at("note")) {
    if (event.key === "Escape") at("note").blur();
    return;
  }
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  const command = task.finished ? FINISHED[key] : commandOf(key, event);
  if (!command) return;
  event.preventDefault();
  command();
}

const FINISHED = { P: back };
const COMMANDS = {
  S: () => finish("skipped"), P: back, T: () => at("plain").click(), "?": () => at("keys").showModal(),
  N: () => { at("notes").open = true; at("note").focus(); },
  ArrowUp: () => mark(current - 1, true), ArrowDown: () => mark(current + 1, true),
};

function commandOf(key, event) {
  if (key === "Enter" && !event.target.closest("button, summary, a")) return () => finish("ranked");
  if (COMMANDS[key]) return COMMANDS[key];
  const k = task.responses.length;
  const pair = { ArrowLeft: 0, 1: 0, 0: 1, "=": 1, ArrowRight: 2, 2: 2 }[key];
  if (isPair()) return pair === undefined ? null : () => choose(CHOICES[pair][1]);
  const given = task.responses[current].rank;
  if (key === "ArrowLeft") return () => rank(current, Math.max(1, (given ?? 2) - 1));
  if (key === "ArrowRight") return () => rank(current, Math.min(k, (given ?? 0) + 1));
  if (/^[0-9]$/.test(key) && Number(key) <= k) return () => typed(Number(key));
  const named = /^[A-M]$/.test(key) ? task.responses.findIndex((response) => response.label === key) : -1;
  return named < 0 ? null : () => mark(named, true);
}

function typed(value) {
  rank(current, value);
  if (!value) return;
  const following = [...task.responses.keys()].map((step) => (current + 1 + step) % task.responses.length);
  const next = following.find((index) => task.responses[index].rank === null);
  if (next !== undefined) mark(next, true);
}

// ---- The overview ----

const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);

function table(title, columns, rows, note) {
  const head = element("thead", {}, element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name))));
  const body = element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell, index) =>
    element(index ? "td" : "th", index ? {} : { scope: "row" }, cell)))));
  const box = element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, head, body));
  return element("section", {}, element("h2", {}, title), box, element("p", {}, note));
}

async function overview() {
  const facts = await surely("overview");
  const sections = [
    table("Progress", ["annotator", "ranked", "skipped", "open"],
      facts.annotators.map((one) => [one.name, `${one.ranked}`, `${one.skipped}`, `${one.open}`]),
      `${facts.groups} groups; ${facts.shared} of them are for everyone, so that agreement can be told.`),
    table("Agreement", ["between", "comparisons", "same annotation", "no contradiction", "Krippendorff's alpha"],
      facts.agreement.map((row) => [row.between, `${row.comparisons}`, percent(row.same), percent(row.no_contradiction),
        row.alpha === null ? "–" : row.alpha.toFixed(3)]),
      "Compared are pairs of responses that both ranked. Same annotation: better, tied or worse alike. No contradiction: " +
      "not opposite. The RRHF paper's three annotators, on two responses at a time, had 57.7 % and 84.4 %."),
  ];
  if (facts.wins) {
    const { a, b, rows } = facts.wins;
    sections.unshift(table(`${a} against ${b}`, ["by", `${a} wins`, "tie", `${a} loses`],
      rows.map((row) => [row.by, `${row.win}`, `${row.tie}`, `${row.lose}`]),
      "Together counts each pair once; where annotators differ, the mean of their ranks decides."));
  }
  at("overview").hidden = false;
  at("tables").replaceChildren(...sections);
  setTimeout(overview, 3000);
}

async function write() {
  const { files } = await surely("export", {});
  at("write").textContent = `Written: ${files.length} files`;
}

// ---- Begin ----

at("submit").onclick = () => finish("ranked");
at("skip").onclick = () => finish("skipped");
at("before").onclick = back;
at("again").onclick = back;
at("help").onclick = () => at("keys").showModal();
at("note").onchange = () => changed();
at("write").onclick = write;
at("plain").onclick = () => {
  plain = !plain;
  at("plain").setAttribute("aria-pressed", plain);
  if (!task.finished) {
    task.note = at("note").value;
    show();
  }
};
document.addEventListener("keydown", press);
await load().catch(() => {});
