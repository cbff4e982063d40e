"""What makes the report's page live: a script that asks the server, and what it may do."""

# Only this server's own script runs and is asked; nothing is fetched from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# An empty icon: a browser asks for one otherwise.
HEAD = '<link rel="icon" href="data:,"><script src="live.js" defer></script>'

SCRIPT = """"use strict";
// Looks whether the server has a newer page, and puts it in place of the old one without a jump.
const note = document.createElement("p");
note.id = "live";
note.className = "note";
note.setAttribute("role", "status");
let version = null;
let failed = 0;

function place(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html").querySelector("main");
  const main = document.querySelector("main");
  const title = (one) => one.querySelector("summary").textContent.replace(/[0-9]+/g, "");
  const open = new Set();
  main.querySelectorAll("details[open]").forEach((one) => open.add(title(one)));
  fresh.querySelectorAll("details").forEach((one) => { one.open = open.has(title(one)); });
  main.replaceChildren(note, ...fresh.childNodes);
}

async function look() {
  try {
    const state = await (await fetch("state", {cache: "no-store"})).json();
    failed = 0;
    if (state.version !== version) {
      const answer = await fetch("./", {cache: "no-store"});
      place(await answer.text());
      version = Number(answer.headers.get("X-Version"));
    }
    const now = new Date().toLocaleTimeString();
    note.textContent = state.problem
      ? `Not up to date: ${state.problem}`
      : `Live at ${now}: ${state.state}, step ${state.step}.`;
  } catch (error) {
    failed += 1;
    note.textContent = "The server does not answer; this page shows what it said last.";
  }
  setTimeout(look, 2000 * Math.min(15, 1 + failed));
}

document.querySelector("main").prepend(note);
look();
"""
