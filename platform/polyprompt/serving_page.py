"""A page to try the endpoint in a browser. It loads nothing from elsewhere."""

POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>polyprompt</title>
<style>
 :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
 body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
 label { display: block; margin-top: .8rem; font-weight: 600; }
 select, textarea, button { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem; margin-top: .2rem; }
 textarea { min-height: 3.2rem; resize: vertical; }
 button { margin-top: 1rem; width: auto; padding: .4rem 1.6rem; }
 #answer { margin-top: 1.5rem; border-top: 1px solid #8888; padding-top: 1rem; }
 #prediction { font-size: 1.4rem; overflow-wrap: anywhere; }
 .bar { display: grid; grid-template-columns: 12rem 1fr 6rem; gap: .6rem; align-items: center; }
 .bar span { overflow-wrap: anywhere; }
 .bar i { height: .7rem; background: #4a7bd0; border-radius: .2rem; }
 .error { color: #c33; } small { color: #888; } pre { overflow: auto; background: #8881; padding: .6rem; }
</style>
<h1>polyprompt</h1>
<form id="form">
 <label for="task">Task</label><select id="task"></select>
 <div id="fields"></div>
 <button>Answer</button>
</form>
<section id="answer" aria-live="polite"></section>
<p><small><a href="/openapi.json">OpenAPI</a>, <a href="/models">models</a>, <a href="/metrics">metrics</a></small></p>
<script>
"use strict";
const $ = id => document.getElementById(id);
const make = (tag, text = "", properties = {}) =>
  Object.assign(document.createElement(tag), {textContent: text}, properties);
let offers = [];

function showFields() {
  const offer = offers[$("task").value];
  const names = offer.task.fields.length ? offer.task.fields : ["input"];
  const own = offer.task.fields.length || offer.task.choices.length ? [] : ["choices"];
  $("fields").replaceChildren(...[...names, ...own].flatMap(name => [
    make("label", name === "choices" ? "choices, one a line (none: free text)" : name, {htmlFor: "field-" + name}),
    make("textarea", "", {id: "field-" + name, name})]));
}

function say(error) { $("answer").replaceChildren(make("p", error, {className: "error"})); }

function show(answer, body, seconds) {
  const about = [answer.model, answer.version, `log-likelihood ${answer.score.toFixed(3)}`,
    `${Math.round(seconds * 1000)} ms`];
  const parts = [make("p", answer.prediction || "(nothing)", {id: "prediction"}), make("small", about.join(", "))];
  const scores = Object.entries(answer.choice_scores).sort((a, b) => b[1] - a[1]);
  const total = scores.reduce((sum, [, score]) => sum + Math.exp(score - scores[0][1]), 0);
  for (const [choice, score] of scores) {
    const share = Math.exp(score - scores[0][1]) / total, row = make("div", "", {className: "bar"}), bar = make("i");
    bar.style.width = 100 * share + "%";
    row.append(make("span", choice), bar, make("small", (100 * share).toFixed(1) + " %"));
    parts.push(row);
  }
  parts.push(make("pre", "POST /predict " + JSON.stringify(body, null, 1)));
  $("answer").replaceChildren(...parts);
}

async function load() {
  const {models} = await (await fetch("/models")).json();
  offers = models.flatMap(model => model.tasks.map(task => ({model: model.name, task})));
  $("task").replaceChildren(...offers.map((offer, i) =>
    make("option", models.length > 1 ? `${offer.task.name} (${offer.model})` : offer.task.name, {value: i})));
  if (offers.length) showFields(); else say("No model is served.");
}

$("task").addEventListener("change", showFields);
$("form").addEventListener("submit", async event => {
  event.preventDefault();
  const offer = offers[$("task").value], row = {task: offer.task.name};
  for (const field of $("fields").querySelectorAll("textarea")) {
    if (field.name !== "choices") row[field.name] = field.value;
    else if (field.value.trim()) row.choices = field.value.split("\\n").map(line => line.trim()).filter(Boolean);
  }
  const body = {model: offer.model, rows: [row]}, began = performance.now();
  try {
    const given = await fetch("/predict",
      {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    const answer = await given.json();
    if (given.ok) show(answer.answers[0], body, (performance.now() - began) / 1000); else say(answer.error.message);
  } catch (error) { say(String(error)); }
});
load().catch(error => say(String(error)));
</script>
</html>
"""
