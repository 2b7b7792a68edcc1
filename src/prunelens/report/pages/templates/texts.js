// The texts: a list of all prompts, and pieces of the page that are unpacked when a prompt of theirs is chosen.
"use strict";
const Texts = (() => {
  const index = JSON.parse(document.getElementById("texts").textContent);
  const nodes = document.querySelectorAll("script.piece");
  const kept = new Map(); // the pieces used last, by number; a page of many prompts never holds them all
  const MOST_KEPT = 4;
  const MOST_LISTED = 200;
  const FEW = 60; // so many prompts can be chosen from without a search

  async function unpack(packed) {
    if (!("DecompressionStream" in window)) throw new Error("The texts need a browser of 2023 or later.");
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return JSON.parse(await new Response(stream).text());
  }

  function pieceOf(prompt) {
    return index.starts.filter((start) => start <= prompt).length - 1;
  }

  // The piece that holds a prompt, and the place of the prompt in it.
  async function of(prompt) {
    const number = pieceOf(prompt);
    const found = kept.get(number) || (await unpack(nodes[number].textContent));
    kept.delete(number);
    kept.set(number, found);
    if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
    found.isSpecial = found.isSpecial || new Set(found.special);
    return { piece: found, place: prompt - index.starts[number] };
  }

  function matches(prompt, words) {
    const { id, kind, start } = index.prompts;
    const text = `${id[prompt]} ${kind[prompt]} ${start[prompt]}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }

  // Prompts in which all words occur, in the order asked for: those listed, and how many there are.
  function search(model, words, order) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const found = index.prompts.id.map((_, prompt) => prompt).filter((prompt) => matches(prompt, wanted));
    if (order === "worst") found.sort((one, other) => index.worst[model][other] - index.worst[model][one]);
    if (order === "agreed") found.sort((one, other) => index.agreed[model][one] - index.agreed[model][other]);
    return { listed: found.slice(0, MOST_LISTED), total: found.length };
  }

  function worst(model) {
    return index.worst[model].reduce((best, kl, prompt, all) => (kl > all[best] ? prompt : best), 0);
  }

  return { index, of, search, worst, isMany: index.prompts.id.length > FEW };
})();
