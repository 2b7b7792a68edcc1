// The text view, the two free texts and the choice of model and prompt. Foreign text only enters as textContent.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("texts").textContent);
  const special = new Set(data.special);
  const byId = (id) => document.getElementById(id);
  const modelSelect = byId("model");
  const promptSelect = byId("prompt");
  const detail = byId("detail");
  const colours = [...document.querySelectorAll(".sentences .swatch")].map((node) => node.style.backgroundColor);
  let model = 0;
  let prompt = 0;

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function number(value) {
    if (value === null || value === undefined) return "—";
    if (value === 0) return "0";
    return value < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  }

  function percent(value) {
    if (value === null || value === undefined) return "—";
    if (value > 0 && value < 0.0005) return "< 0.1 %";
    return (100 * value).toFixed(1) + " %";
  }

  // A token standing alone: blanks shown, on one line.
  function word(id) {
    const text = data.tokens[id];
    return /^ +$/.test(text) ? "␣".repeat(text.length) : text.replaceAll("\n", "");
  }

  function tokenNode(id, className) {
    return make("span", className + (special.has(id) ? " special" : ""), data.tokens[id]);
  }

  // ---- the coloured text
  function level(kl) {
    return kl === null ? 0 : data.edges.filter((edge) => kl >= edge).length;
  }

  function drawTokens() {
    const steps = data.steps[model];
    const nodes = data.dense.tokens[prompt].map((id, index) => {
      const flip = steps.same[prompt][index] === 0 ? " flip" : "";
      const node = tokenNode(id, "token-of k" + level(steps.kl[prompt][index]) + flip);
      node.tabIndex = -1;
      node.dataset.index = index;
      return node;
    });
    byId("tokens").replaceChildren(...nodes);
    byId("prompt-text").textContent = data.prompts.text[prompt];
    if (nodes.length) choose(worst(steps.kl[prompt]), false);
    else detail.replaceChildren(make("p", "muted", "The dense model wrote nothing."));
  }

  function worst(values) {
    return values.reduce((best, value, index) => (value > values[best] ? index : best), 0);
  }

  function choose(index, focus) {
    const nodes = byId("tokens").children;
    for (const node of nodes) {
      node.tabIndex = -1;
      node.classList.remove("chosen");
    }
    nodes[index].tabIndex = 0;
    nodes[index].classList.add("chosen");
    if (focus) nodes[index].focus();
    drawDetail(index);
  }

  function drawDetail(index) {
    const steps = data.steps[model];
    const [kl, tv, rank] = [steps.kl, steps.tv, steps.rank].map((column) => column[prompt][index]);
    const head = make("p", "head", `Step ${index + 1}: “${word(data.dense.tokens[prompt][index])}”`);
    const place = rank === null ? "—" : rank;
    const facts = make("p", "facts", `KL ${number(kl)} nats, TV ${number(tv)}, rank of the dense top token ${place}`);
    const sides = make("div", "sides");
    sides.append(side("Dense", "dense", index, "var(--muted)"));
    sides.append(side("Compressed", "compressed", index, colours[model]));
    detail.replaceChildren(head, facts, sides);
  }

  function side(title, name, index, colour) {
    const box = make("div");
    box.append(make("h5", "", title));
    const [tokens, probs] = data.blocks[data.alternatives[model][name][prompt]];
    (tokens[index] || []).forEach((id, place) => box.append(alternative(id, probs[index][place], colour)));
    return box;
  }

  function alternative(id, probability, colour) {
    const row = make("div", "alt");
    const fill = make("span", "fill");
    fill.style.width = 100 * (probability || 0) + "%";
    fill.style.background = colour;
    row.append(fill, make("span", "word" + (special.has(id) ? " special" : ""), word(id)));
    row.append(make("span", "p", percent(probability)));
    row.title = word(id);
    return row;
  }

  function keyMove(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    const current = event.target.dataset.index;
    if (move === undefined || current === undefined) return;
    event.preventDefault();
    const last = byId("tokens").children.length - 1;
    choose(Math.min(last, Math.max(0, Number(current) + move)), true);
  }

  // ---- the two free texts
  function drawOwn(node, written, parts) {
    const common = data.free[model].agreed[prompt];
    const ids = written.tokens[prompt];
    const children = ids.map((id, index) => tokenNode(id, parts && index >= common ? "diverged" : ""));
    if (parts) children.splice(common, 0, make("span", "part", `diverges at token ${common + 1}`));
    children.push(make("span", "end", written.ended[prompt] ? `ended with EOS after ${ids.length} tokens` : `cut at ${ids.length} tokens`));
    node.replaceChildren(...children);
    node.style.setProperty("--mark", colours[model]);
  }

  function drawSides() {
    const dense = data.dense.tokens[prompt];
    const own = data.free[model].tokens[prompt];
    const same = dense.length === own.length && data.free[model].agreed[prompt] >= dense.length;
    drawOwn(byId("own-dense"), data.dense, !same);
    drawOwn(byId("own-compressed"), data.free[model], !same);
    byId("own-name").textContent = data.models[model] + (same ? " (the texts never diverge)" : "");
  }

  // ---- the choice
  function chooseModel() {
    byId("model-swatch").style.background = colours[model];
    for (const node of document.querySelectorAll("[data-model]")) node.hidden = Number(node.dataset.model) !== model;
    update();
    Figures.show();
  }

  function update() {
    if (!data.prompts.id.length) return;
    drawTokens();
    drawSides();
  }

  function jump(event) {
    const button = event.target.closest(".jump");
    if (!button) return;
    prompt = Number(button.dataset.prompt);
    promptSelect.value = String(prompt);
    update();
    choose(Number(button.dataset.step) - 1, true);
    byId("text").scrollIntoView();
  }

  function start() {
    promptSelect.append(
      ...data.prompts.id.map((id, index) => {
        const text = data.prompts.text[index].replaceAll("\n", " ");
        const option = make("option", "", `${id}: ${text.length > 70 ? text.slice(0, 69) + "…" : text}`);
        option.value = String(index);
        return option;
      }),
    );
    for (const node of document.querySelectorAll("[data-of]")) node.textContent = data.models[Number(node.dataset.of)];
    modelSelect.addEventListener("change", () => { model = Number(modelSelect.value); chooseModel(); });
    promptSelect.addEventListener("change", () => { prompt = Number(promptSelect.value); update(); });
    byId("tokens").addEventListener("keydown", keyMove);
    for (const kind of ["pointerover", "focusin"]) {
      byId("tokens").addEventListener(kind, (event) => {
        const index = event.target.dataset.index;
        if (index !== undefined) choose(Number(index), false);
      });
    }
    document.addEventListener("click", jump);
    model = Number(modelSelect.value) || 0;
    prompt = data.prompts.id.length ? worst(data.steps[model].kl.map((kl) => Math.max(0, ...kl))) : 0;
    promptSelect.value = String(prompt);
    chooseModel();
  }

  start();
})();
