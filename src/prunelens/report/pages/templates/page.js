// The text view, the two free texts and the choice of model and prompt. Foreign text only enters as textContent.
"use strict";
(() => {
  const index = Texts.index;
  const byId = (id) => document.getElementById(id);
  const modelSelect = byId("model");
  const promptSelect = byId("prompt");
  const detail = byId("detail");
  const colours = [...document.querySelectorAll(".sentences .swatch")].map((node) => node.style.backgroundColor);
  let model = 0;
  let prompt = 0;
  let data = null; // the piece that holds the prompt
  let place = 0; // and where in it

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

  function share(parts) {
    return parts === null ? null : parts / index.unit;
  }

  // A token standing alone: blanks shown, on one line.
  function word(id) {
    const text = data.tokens[id];
    return /^ +$/.test(text) ? "␣".repeat(text.length) : text.replaceAll("\n", "");
  }

  function tokenNode(id, className) {
    return make("span", className + (data.isSpecial.has(id) ? " special" : ""), data.tokens[id]);
  }

  // ---- the coloured text
  function level(kl) {
    return kl === null ? 0 : index.edges.filter((edge) => kl >= edge).length;
  }

  function drawTokens() {
    const steps = data.steps[model];
    const nodes = data.dense.tokens[place].map((id, at) => {
      const flip = steps.same[place][at] === 0 ? " flip" : "";
      const node = tokenNode(id, "token-of k" + level(steps.kl[place][at]) + flip);
      node.tabIndex = -1;
      node.dataset.index = at;
      return node;
    });
    byId("tokens").replaceChildren(...nodes);
    byId("prompt-text").textContent = data.text[place];
    if (nodes.length) choose(worst(steps.kl[place]), false);
    else detail.replaceChildren(make("p", "muted", "The dense model wrote nothing."));
  }

  function worst(values) {
    return values.reduce((best, value, at) => (value > values[best] ? at : best), 0);
  }

  function choose(at, focus) {
    const nodes = byId("tokens").children;
    for (const node of nodes) {
      node.tabIndex = -1;
      node.classList.remove("chosen");
    }
    nodes[at].tabIndex = 0;
    nodes[at].classList.add("chosen");
    if (focus) nodes[at].focus();
    drawDetail(at);
  }

  function drawDetail(at) {
    const steps = data.steps[model];
    const [kl, tv, rank] = [steps.kl, steps.tv, steps.rank].map((column) => column[place][at]);
    const head = make("p", "head", `Step ${at + 1}: “${word(data.dense.tokens[place][at])}”`);
    const ranked = rank === null ? "—" : rank;
    const facts = make("p", "facts", `KL ${number(kl)} nats, TV ${number(tv)}, rank of the dense top token ${ranked}`);
    const sides = make("div", "sides");
    sides.append(side("Dense", "dense", at, "var(--muted)"));
    sides.append(side("Compressed", "compressed", at, colours[model]));
    detail.replaceChildren(head, facts, sides);
    if (index.fewer) detail.append(make("p", "muted", `The ${index.fewer} most likely tokens; the table “alternatives” has more.`));
  }

  function side(title, name, at, colour) {
    const box = make("div");
    box.append(make("h5", "", title));
    const [tokens, probs] = data.blocks[data.alternatives[model][name][place]];
    (tokens[at] || []).forEach((id, order) => box.append(alternative(id, share(probs[at][order]), colour)));
    return box;
  }

  function alternative(id, probability, colour) {
    const row = make("div", "alt");
    const fill = make("span", "fill");
    fill.style.width = 100 * (probability || 0) + "%";
    fill.style.background = colour;
    row.append(fill, make("span", "word" + (data.isSpecial.has(id) ? " special" : ""), word(id)));
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
    const common = index.agreed[model][prompt];
    const ids = written.tokens[place];
    const children = ids.map((id, at) => tokenNode(id, parts && at >= common ? "diverged" : ""));
    if (parts) children.splice(common, 0, make("span", "part", `diverges at token ${common + 1}`));
    children.push(make("span", "end", written.ended[place] ? `ended with EOS after ${ids.length} tokens` : `cut at ${ids.length} tokens`));
    node.replaceChildren(...children);
    node.style.setProperty("--mark", colours[model]);
  }

  function drawSides() {
    const dense = data.dense.tokens[place];
    const own = data.free[model].tokens[place];
    const same = dense.length === own.length && index.agreed[model][prompt] >= dense.length;
    drawOwn(byId("own-dense"), data.dense, !same);
    drawOwn(byId("own-compressed"), data.free[model], !same);
    byId("own-name").textContent = index.models[model] + (same ? " (the texts never diverge)" : "");
  }

  // ---- the choice
  async function chooseModel() {
    byId("model-swatch").style.background = colours[model];
    for (const node of document.querySelectorAll("[data-model]")) node.hidden = Number(node.dataset.model) !== model;
    list();
    await update();
    Figures.show();
  }

  async function update() {
    if (!index.prompts.id.length) return;
    const wanted = prompt;
    let found;
    try {
      found = await Texts.of(wanted);
    } catch (error) {
      detail.replaceChildren(make("p", "note", error.message));
      return;
    }
    if (wanted !== prompt) return; // another one was chosen meanwhile
    [data, place] = [found.piece, found.place];
    drawTokens();
    drawSides();
  }

  function option(number) {
    const text = index.prompts.start[number];
    const node = make("option", "", `${index.prompts.id[number]}: ${text.length > 70 ? text.slice(0, 69) + "…" : text}`);
    node.value = String(number);
    return node;
  }

  // The prompts to choose from; the chosen one stays among them.
  function list() {
    const order = Texts.isMany ? byId("order").value : "asked";
    const { listed, total } = Texts.search(model, byId("words").value, order);
    const others = listed.includes(prompt) ? listed : [prompt, ...listed];
    promptSelect.replaceChildren(...(index.prompts.id.length ? others.map(option) : []));
    promptSelect.value = String(prompt);
    const all = index.prompts.id.length;
    const found = total < all ? `${total} of ${all} prompts` : `${all} prompts`;
    byId("listed").textContent = found + (listed.length < total ? `, the first ${listed.length} listed` : "");
    return listed;
  }

  function find() {
    const listed = list();
    if (!listed.length || listed.includes(prompt)) return;
    prompt = listed[0];
    list();
    update();
  }

  async function jump(event) {
    const button = event.target.closest(".jump");
    if (!button) return;
    prompt = Number(button.dataset.prompt);
    list();
    await update();
    choose(Number(button.dataset.step) - 1, true);
    byId("text").scrollIntoView();
  }

  function start() {
    byId("find").hidden = !Texts.isMany;
    for (const node of document.querySelectorAll("[data-of]")) node.textContent = index.models[Number(node.dataset.of)];
    modelSelect.addEventListener("change", () => { model = Number(modelSelect.value); chooseModel(); });
    promptSelect.addEventListener("change", () => { prompt = Number(promptSelect.value); update(); });
    byId("words").addEventListener("input", find);
    byId("order").addEventListener("change", list);
    byId("tokens").addEventListener("keydown", keyMove);
    for (const kind of ["pointerover", "focusin"]) {
      byId("tokens").addEventListener(kind, (event) => {
        const at = event.target.dataset.index;
        if (at !== undefined) choose(Number(at), false);
      });
    }
    document.addEventListener("click", jump);
    model = Number(modelSelect.value) || 0;
    prompt = index.prompts.id.length ? Texts.worst(model) : 0;
    chooseModel();
  }

  start();
})();
